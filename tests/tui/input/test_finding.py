"""Jumping to an expert by name, and through the flagged ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell, drive, ready
from tui import hints
from tui.input import finding
from tui.keys.keymap import BY_ID
from tui.state.app_state import AppState
from tui.widgets.status import badges


def state_after(*lines: str) -> AppState:
    engine = FakeEngine()
    engine.play("load demo", *lines)
    return AppState(view=engine.view(), rows=engine.rows(), lines=lines)


@pytest.mark.parametrize("text", ["4:11", "L4:E11", " l4 : e11 "])
def test_an_expert_is_found_by_its_name(text: str) -> None:
    state, problem = finding.jump(state_after(), text)
    assert (state.cursor, problem) == ((4, 11), "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "no expert is called or marked 'x': type layer:expert, such as 12:40"),
        ("9:1", "layer 9 has no experts; the MoE layers are 0 to 5"),
        ("4:16", "expert 16 does not exist; the experts are 0 to 15"),
    ],
)
def test_what_is_not_there_is_said(text: str, problem: str) -> None:
    before = state_after()
    assert finding.jump(before, text) == (before, problem)


def test_the_keys_step_through_what_is_flagged_and_begin_again() -> None:
    state = state_after(*CALIBRATED, "steer --activate 1:2")
    seen = []
    for _ in range(3):
        state, problem = finding.step_flagged(state, 1)
        assert problem == ""
        seen.append(state.cursor)
    # Expert 3 of layer 0 was never seen.
    assert seen == [(0, 3), (1, 2), (0, 3)]
    assert finding.step_flagged(state, -1)[0].cursor == (1, 2)
    nothing = state_after()
    assert finding.step_flagged(nothing, 1)[1].startswith("no expert is pruned")


def test_a_slash_asks_for_the_expert_and_goes_there() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("slash", "4", "colon", "1", "1", "enter")
        assert shell.app.state.cursor == (4, 11)
        await shell.press("slash", "9", "enter")
        assert "layer 9 has no experts" in shell.echo

    drive(test)


# Statistics of other weights --------------------------------------------------------------------
def test_statistics_of_other_weights_are_marked_and_calibrating_comes_first() -> None:
    state = state_after(*CALIBRATED)
    assert state.view.heat is not None
    heat = replace(state.view.heat, stale=True)
    state = replace(state, view=replace(state.view, heat=heat))
    assert badges(state) == ["STALE"]
    assert hints.next_key(state) == "collect"
    assert "measured on other weights: c calibrates again" in hints.next_step(state)
    assert "measured on other weights" in hints.why_not(state, BY_ID["prune"])
    assert hints.for_bar(state, "experts", 80)[0].key == "collect"


def test_badges_tell_recording_steering_and_unsaved_edits() -> None:
    state = replace(state_after(*APPLIED, "steer --activate 1:2"), recording="s.mlxfun")
    assert badges(state) == ["REC", "STEERED ▲1", "EDITED"]
    assert badges(replace(state, saved=frozenset({state.view.state})))[-1] == "STEERED ▲1"


def test_after_a_search_the_keys_step_through_its_matches_until_escape() -> None:
    @ready(*CALIBRATED, "steer --activate 1:2,4:5")
    async def test(shell: Shell) -> None:
        await shell.press("slash", *"forced", "enter")
        assert shell.app.state.cursor == (1, 2)
        assert "step through the experts with 'forced'" in shell.echo
        await shell.press("n")
        assert shell.app.state.cursor == (4, 5)
        await shell.press("n")
        assert shell.app.state.cursor == (1, 2), "and not expert 3 of layer 0, which was never seen"
        await shell.press("N")
        assert shell.app.state.cursor == (4, 5)
        await shell.press("escape", "n")
        assert shell.app.state.cursor == (0, 3)

    drive(test)
