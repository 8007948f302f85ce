"""Picking experts by hand on the screen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui import hints
from tui.input import expert_selection
from tui.keys.keymap import BY_ID
from tui.state.app_state import PROBE_LINE


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def picked(shell: Shell) -> list[list[int]]:
    mask = expert_selection.pruned_mask(shell.app.state)
    assert mask is not None
    return [row.nonzero()[0].tolist() for row in mask]


def plan_text(shell: Shell) -> str:
    from rich.console import Console

    console = Console(width=60, color_system=None)
    visual = shell.app.main.query_one("#plan Static")
    with console.capture() as capture:
        console.print(visual._renderable if hasattr(visual, "_renderable") else visual.content)
    return capture.get()


def test_a_pick_shows_its_cost_before_the_engine_hears_of_it() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        before = list(shell.engine.lines)
        await shell.press("right", "right", "space")
        assert picked(shell)[0] == [2]
        assert expert_selection.tally(shell.app.state).startswith("1 expert pruned · -42.7 KiB · ")
        assert shell.engine.lines == before
        await shell.press("space")
        assert picked(shell)[0] == []

    drive(test)


def test_a_range_is_picked_as_one_and_spared_as_one() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("shift+right", "shift+down", "space")
        assert picked(shell)[:3] == [[0, 1], [0, 1], []]
        await shell.press("up", "left")
        await shell.press("L", "J", "space")
        assert picked(shell)[:3] == [[], [], []]

    drive(test)


def test_a_column_goes_from_every_layer() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("right", "C", "space")
        assert picked(shell) == [[1]] * 6
        assert shell.app.state.anchor is None

    drive(test)


def test_a_layer_keeps_the_experts_that_a_token_uses() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("R", "space")
        assert picked(shell)[0] == []
        assert shell.echo == "! layer 0 would keep 0 experts, and every token uses 2"

    drive(test)


def test_a_hand_that_rests_becomes_one_command_line_and_is_probed() -> None:
    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        engine = shell.engine
        before = len(engine.lines)
        await shell.press("C", "space", "home", "up", "right", "C", "space")
        clock.now += 0.5
        await shell.settle()
        assert engine.lines[before:] == []
        clock.now += 0.3
        await shell.settle()
        line = "select --drop " + ",".join(f"{layer}:0..1" for layer in range(6))
        assert engine.lines[before:] == [line]
        engine.finish()
        await shell.settle()
        assert shell.app.state.draft is None
        assert engine.lines[before:] == [line, PROBE_LINE]
        engine.finish()
        await shell.settle()
        await shell.settle()
        assert engine.lines[before:] == [line, PROBE_LINE]  # once for each plan
        assert "quick probe: perplexity 1.056 x the checkpoint's, KL 0.0412" in plan_text(shell)
        assert shell.app.state.log[-1].line == line  # the probe leaves the log alone

    drive(test, now=clock)


def test_a_newer_pick_cancels_the_probe() -> None:
    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        engine = shell.engine
        await shell.press("C", "space")
        clock.now += 1
        await shell.settle()
        engine.step(2)
        await shell.settle()
        engine.step()
        assert engine.busy == PROBE_LINE
        await shell.press("right", "space")
        assert engine.cancelled == 1
        engine.step()
        await shell.settle()
        assert shell.app.state.log[-1].line.startswith("select ")

    drive(test, now=clock)


def test_a_command_does_not_wait_for_a_probe() -> None:
    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("C", "space")
        clock.now += 1
        await shell.settle()
        shell.engine.step(2)
        await shell.settle()
        shell.engine.step()
        await shell.press("v")
        assert shell.engine.cancelled == 1
        assert shell.engine.queue == ("preview",)

    drive(test, now=clock)


def test_what_is_picked_while_a_line_is_on_its_way_counts_from_what_that_leaves() -> None:
    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        engine = shell.engine
        await shell.press("space")
        clock.now += 1
        await shell.settle()
        assert engine.lines[-1] == "select --drop 0:0"
        await shell.press("space")  # back again, before the engine has heard the first
        clock.now += 1
        await shell.settle()
        assert engine.lines[-1] == "select --drop 0:0"
        engine.finish()
        await shell.settle()
        assert engine.lines[-1] == "select --keep 0:0"
        engine.finish()
        await shell.settle()
        assert picked(shell)[0] == []

    drive(test, now=clock)


def test_picking_goes_on_from_the_staged_plan() -> None:
    clock = Clock()

    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        going = picked(shell)[0]
        assert len(going) == 4
        shell.app.main.focus_panel("experts")
        shell.app.state = replace(shell.app.state, cursor=(0, going[0]))
        await shell.press("space")
        clock.now += 1
        await shell.settle()
        assert shell.engine.lines[-1] == f"select --keep 0:{going[0]}"

    drive(test, now=clock)


def test_an_uneven_selection_is_not_applied_but_evened_out() -> None:
    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("space")
        clock.now += 1
        await shell.settle()
        shell.engine.finish()
        await shell.settle()
        shell.engine.finish()
        await shell.settle()
        reason = "layer 0 loses 1 expert, the others 0: press E to even them out by score"
        assert hints.why_not(shell.app.state, BY_ID["apply"]) == reason
        assert hints.next_key(shell.app.state) == "pick_even"
        await shell.press("a")
        assert shell.echo == f"! apply: {reason}"
        await shell.press("E")
        assert [len(row) for row in picked(shell)] == [1] * 6
        assert hints.why_not(shell.app.state, BY_ID["apply"]) == ""

    drive(test, now=clock)


def test_the_count_is_dialled_in_the_plan_panel() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.main.focus_panel("plan")
        await shell.press("plus", "plus", "plus", "minus")
        assert [len(row) for row in picked(shell)] == [2] * 6
        lowest = shell.app.state.view.heat.metrics["reap_sum"].argsort(axis=1, kind="stable")
        # Of equal scores the higher number goes.
        assert set(picked(shell)[1]) <= set(lowest[1, :3].tolist())
        assert "manual selection: 12 experts pruned" in plan_text(shell)

    drive(test)


def test_a_plan_from_elsewhere_replaces_what_was_picked() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("space")
        await shell.play("prune --n-prune 4")
        assert shell.app.state.draft is None
        assert [len(row) for row in picked(shell)] == [4] * 6

    drive(test)


@pytest.mark.parametrize("line", ["select --drop 9:9", "nonsense"])
def test_a_selection_that_fails_is_forgotten_and_says_why(line: str) -> None:
    class Refusing(FakeEngine):
        def _do_select(self, job, args):
            raise ValueError("layer 9 is not an MoE layer")
            yield

    clock = Clock()

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("space")
        clock.now += 1
        await shell.settle()
        shell.engine.finish()
        await shell.settle()
        assert shell.app.state.draft is None
        assert "layer 9 is not an MoE layer" in shell.echo

    drive(test, engine=Refusing(), now=clock)


def test_undo_takes_back_the_changes_of_a_selection_one_by_one() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("space", "right", "space")
        assert expert_selection.pruned_mask(shell.app.state).sum() == 2
        assert hints.undoes(shell.app.state) == "selection"
        before = list(shell.engine.lines)
        await shell.press("u")
        assert expert_selection.pruned_mask(shell.app.state).sum() == 1
        await shell.press("u")
        assert expert_selection.pruned_mask(shell.app.state).sum() == 0
        assert shell.engine.lines == before, "no command ran"

    drive(test)


def test_what_undo_would_take_back_is_named_before_it_happens() -> None:
    @ready(*CALIBRATED, "prune --n-prune 4", "apply")
    async def test(shell: Shell) -> None:
        assert "u undo prune --n-prune 4" in shell.screen
        history = shell.app.main.panel_named("history")
        assert str(history.border_subtitle) == "u undoes: prune --n-prune 4"

    drive(test)
