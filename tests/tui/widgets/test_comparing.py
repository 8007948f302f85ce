"""Two files of statistics against each other in the map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxfun.calibration.reports import DiffReport
from mlxfun.events import JobEnded
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tests.tui.test_hints import state_after
from tui.heat import model as heat
from tui.heat.model import APART, LEVELS, STEPS
from tui.heat.paint import DARK, LIGHT, apart_legend, luma, ramp_colour
from tui.heat.words import explain
from tui.state.reducer import reduce


def report(share: np.ndarray) -> DiffReport:
    return DiffReport(
        ("runs/code.npz", "runs/prose.npz"), None, (8, 8), (80, 80), {"reap_sum": 0.87, "freq": 0.9},
        {"reap_sum": 0.75, "freq": 0.5}, (), (), tuple(range(6)),
        {"reap_sum": share, "freq": share * 2},
    )  # fmt: skip


def share() -> np.ndarray:
    values = np.zeros((6, 16))
    values[0, :4] = (0.04, -0.04, 0.01, -0.02)
    return values


def compared():
    state = state_after("load demo", *CALIBRATED)
    ended = JobEnded(9, "stats diff a b", report(share()), None, 0.1, "s")
    return reduce(state, ended, 1.0)


def test_a_comparison_comes_to_the_map_at_once_and_m_leaves_it() -> None:
    model = heat.heat_model(compared())
    assert model is not None
    assert model.metric == "A-B reap_sum"
    assert {"A-B freq", "reap_sum"} <= set(model.metrics)


def test_sign_and_size_of_a_difference_are_in_its_cell() -> None:
    model = heat.heat_model(compared())
    assert model is not None
    kinds, level = np.divmod(model.codes[0, :5], LEVELS)
    assert kinds.tolist() == [APART] * 5
    assert (level % 2).tolist() == [1, 0, 1, 0, 0]
    assert (level // 2).tolist() == [STEPS - 1, STEPS - 1, 3, 6, 0]


def test_in_a_shared_cell_the_greater_difference_shows() -> None:
    codes = heat.heat_model(compared()).codes[0, :4]
    assert codes[[2, 3]].max() == codes[3]


@pytest.mark.parametrize("inks", [DARK, LIGHT])
def test_more_is_warm_less_is_cool_and_none_is_neither(inks) -> None:
    none = ramp_colour(inks, APART, 0)
    more, less = (ramp_colour(inks, APART, 2 * (STEPS - 1) + side) for side in (1, 0))
    assert more[0] > more[2]
    assert less[2] > less[0]
    assert max(none) - min(none) <= 10
    assert abs(luma(more) - luma(none)) > 60
    assert len(apart_legend(inks)) == 8


def test_the_cell_is_explained_in_words() -> None:
    state = compared()
    model = heat.heat_model(state)
    assert explain(model, (0, 0)) == (
        "L0:E0 · 4.00 points more of its layer's reap_sum in A than in B"
    )
    assert explain(model, (0, 1)).endswith("more of its layer's reap_sum in B than in A")
    assert explain(model, (5, 5)).endswith("the same share of reap_sum in A and B")


def test_a_comparison_of_another_model_stays_in_the_report() -> None:
    state = state_after("load demo", *CALIBRATED)
    other = replace(report(share()), layers=(1, 2, 3))
    model = heat.heat_model(reduce(state, JobEnded(9, "x", other, None, 0.1, "s"), 1.0))
    assert model is not None
    assert model.metric == "reap_sum"


def test_the_caption_names_both_files_and_how_alike_they_are() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.state = compared()
        shell.app._show()
        await shell.settle()
        title = shell.app.main.panel_named("experts").border_title
        assert title == (
            "1 experts · A code.npz - B prose.npz · share of reap_sum · rank correlation 0.87 · "
            "75% of the lowest quarter shared"
        )

    drive(test)
