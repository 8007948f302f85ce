"""Which panel shows the outcome of a job. Pure."""

from __future__ import annotations

import pytest

from mlxfun.editing.reports import ShownSide, StepAction, StepReport
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import JobEnded
from mlxfun.report import Report, TextReport
from tui.input.actions import panel_for


def evaluated(subject: ShownSide) -> EvaluateReport:
    return EvaluateReport(
        subject, "s", ("a",), {"all": 24.0}, {"all": (20.0, 28.0)}, {"all": 16.0}, 99, {"a": 99},
        None, None, None, None, (), False,
    )  # fmt: skip


def step(action: StepAction) -> StepReport:
    return StepReport(action, 1, "prune", "a", "b", "base", 0, 1.0)


@pytest.mark.parametrize(
    ("line", "report", "panel"),
    [
        ("preview", evaluated("candidate"), "plan"),  # beside the plan that it measures
        ("evaluate", evaluated("current"), "log"),
        ("apply", step("apply"), "history"),
        ("flip", step("flip"), None),  # the plan's panel and the status line say it
        ("info", TextReport("a model"), "log"),
    ],
)
def test_an_outcome_is_shown_where_it_belongs(line: str, report: Report, panel: str | None) -> None:
    assert panel_for(JobEnded(1, line, report, None, 0.1, "s")) == panel


def test_a_failed_job_shows_no_panel() -> None:
    assert panel_for(JobEnded(1, "preview", None, "cannot", 0.1, "s")) is None


def test_every_staged_plan_brings_its_panel_forward() -> None:
    class Ablation(Report):
        kind = "abliterate"

    assert panel_for(JobEnded(1, "abliterate", Ablation(), None, 0.1, "s")) == "plan"
