"""The panels of plan, history and reports, and the status line."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from textual.widgets import Static

from mlxfun.report import Report, TextReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell, drive, ready, text_of
from tui.app import ShellApp
from tui.state.app_state import Entry
from tui.widgets.experts.legend import Legend
from tui.widgets.history import HistoryPanel, NodeList
from tui.widgets.log import Reports
from tui.widgets.plan import PlanPanel, plan_body
from tui.widgets.status import StatusLine


def plan_text(shell: Shell) -> str:
    panel = shell.app.main.query_one(PlanPanel)
    return "\n".join(
        "".join(segment.text for segment in line).rstrip()
        for line in shell.app.console.render_lines(
            panel.query_one(Static).content,
            shell.app.console.options.update(width=60),
        )
    )


# Panels ---------------------------------------------------------------------------------------
def test_the_plan_says_what_goes_what_it_saves_and_how_to_decide() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        text = plan_text(shell)
        assert "24 experts pruned" in text
        assert "6.0 MiB → 5.0 MiB (-17%)" in text
        assert "not measured yet: press v" in text
        assert "7-10" in text
        await shell.play("preview")
        text = plan_text(shell)
        assert "perplexity 14.110 → 14.620 (1.036 x)" in text
        assert "KL mean 0.0312, p99 0.410" in text
        assert "top-1 agreement 94.1%" in text

    drive(test)


def test_without_a_plan_the_panel_says_how_to_get_one() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert "Press c to calibrate" in plan_text(shell)
        await shell.play(*CALIBRATED)
        assert "Press p to stage a prune" in plan_text(shell)

    drive(test)


def test_the_state_of_the_model_stays_in_sight_when_the_history_gets_few_lines() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        state = shell.app.state
        history = state.view.history
        assert history is not None
        nodes = [replace(history.nodes[0], id=n, parent=n - 1 if n else None) for n in range(20)]
        long = replace(history, nodes=tuple(nodes), current=19)
        shell.app._change(replace(state, view=replace(state.view, history=long)))
        await shell.settle()
        assert "● 19 " in shell.screen
        await shell.pilot.resize_terminal(112, 30)
        await shell.until(lambda: shell.app.main.query_one(NodeList).size.height < 15)
        await shell.until(lambda: "● 19 " in shell.screen)

    drive(test, size=(160, 60))


def test_the_history_marks_where_the_model_is_and_enter_goes_elsewhere() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        assert "● 1 prune --n-prune 4" in text_of(shell, NodeList)
        await shell.press("4", "up", "enter")
        assert shell.engine.lines[-1] == "goto 0"
        shell.engine.finish()
        await shell.settle()
        assert "● 0 load demo" in text_of(shell, NodeList)
        assert shell.app.main.query_one(HistoryPanel).selected == 0

    drive(test)


def test_reports_go_through_the_renderer() -> None:
    def render(report: Report) -> Text:
        return Text(f"<<{report.kind}>>")

    engine = FakeEngine()
    app = ShellApp(engine, renderer=render, clock=lambda: 0.0)

    async def run() -> str:
        async with app.run_test(size=(160, 45)) as pilot:
            shell = Shell(engine, app, pilot)
            await shell.play("load demo", "layers")
            return text_of(shell, Reports)

    import asyncio

    assert "✓ layers  0.4 s\n<<text>>" in asyncio.run(run())


def test_a_report_that_does_not_fit_is_shown_from_its_head() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        long = "\n".join(f"line {n}" for n in range(40))
        await shell.play("layers")
        entry = Entry("ok", "help", long, TextReport(long))
        shell.app._change(replace(shell.app.state, log=(*shell.app.state.log, entry), echo=entry))
        await shell.settle()
        assert text_of(shell, Reports).splitlines()[:2] == ["✓ help", "line 0"]
        assert shell.echo == "✓ help: see the reports (5)"
        await shell.play("layers")
        await shell.until(lambda: text_of(shell, Reports).splitlines()[-1] == "layers done")

    drive(test)


def test_a_report_is_shown_from_its_head_also_where_the_layout_comes_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early: list[bool] = []
    later = Reports.call_after_refresh

    def at_once_the_first_time(self: Reports, callback: Any, *args: Any) -> Any:
        if early:
            return later(self, callback, *args)
        early.append(True)
        return callback(*args)

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        long = "\n".join(f"line {n}" for n in range(40))
        entry = Entry("ok", "help", long, TextReport(long))
        monkeypatch.setattr(Reports, "call_after_refresh", at_once_the_first_time)
        shell.app._change(replace(shell.app.state, log=(*shell.app.state.log, entry), echo=entry))
        await shell.settle()
        assert early
        assert text_of(shell, Reports).splitlines()[:2] == ["✓ help", "line 0"]

    drive(test)


def test_reports_are_wrapped_again_when_the_terminal_changes() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("help")
        shell.engine.finish()
        wide = text_of(shell, Reports)
        await shell.pilot.resize_terminal(112, 40)
        await shell.settle()
        narrow = text_of(shell, Reports)
        assert "top-2" in wide
        assert narrow != wide
        assert max(len(line) for line in narrow.splitlines()) <= 45

    drive(test)


def test_the_status_line_tells_job_rate_and_time_left() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.run("info")
        shell.engine.step(3)
        await shell.settle()
        text = str(shell.app.main.query_one(StatusLine).visual)
        assert "8/32 samples 4 samples/s ETA 6 s" in text
        assert "1 queued" in text

    drive(test)


def test_a_plan_in_which_everybody_stays_says_what_it_changes_in_its_own_words() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        view = shell.app.state.view
        assert view.plan is not None
        none = dict.fromkeys(view.plan.pruned, ())
        plan = replace(view.plan, technique="bake", pruned=none, mass_lost=None)
        text = Console(width=80, record=True, file=StringIO())
        text.print(plan_body(replace(view, plan=plan)))
        said = text.export_text()
        assert "staged bake" in said
        assert "work lost" not in said
        assert "(-" not in said

    drive(test)


def test_the_legend_names_what_is_on_the_map_and_stays() -> None:
    @ready(*CALIBRATED, "steer --level 2:5=1.5")
    async def test(shell: Shell) -> None:
        assert shell.app.main.query_one(Legend).display
        shell.app.state = replace(shell.app.state, cursor=(2, 5))
        shell.app._show()
        await shell.settle()
        words = str(shell.app.main.query_one("#words").visual)
        assert "bias +1.5" in words
        assert words.endswith("% of its layer")
        legend = text_of(shell, Legend)
        assert legend.split() == [
            *("low", "high", "(linear)", "·", "never", "seen", "▲", "force", "on")
        ]  # fmt: skip

    drive(test, size=(80, 24))
