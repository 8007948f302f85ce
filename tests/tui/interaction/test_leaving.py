"""Cancelling a job, and leaving the shell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxfun.events import Notice
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell, drive, ready
from tui.screen import MainScreen


# Cancelling -----------------------------------------------------------------------------------
class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_two_escapes_cancel_and_one_only_asks() -> None:
    clock = Clock()

    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.press("escape")
        assert shell.engine.cancelled == 0
        assert shell.echo == "· esc again cancels: collect --dataset demo:mixed"
        clock.now += 5.0
        await shell.press("escape")
        assert shell.engine.cancelled == 0
        clock.now += 0.5
        await shell.press("escape")
        assert shell.engine.cancelled == 1

    drive(test, now=clock)


@pytest.mark.parametrize("where", ["1", "i", "colon"])
def test_control_c_cancels_from_anywhere(where: str) -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.press(where, "ctrl+c")
        assert shell.engine.cancelled == 1
        assert shell.app.is_running

    drive(test)


def test_leaving_in_the_middle_of_a_job_cancels_it_and_leaves() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.pilot.press("ctrl+q")

    shell = drive(test)
    assert shell.engine.cancelled == 1
    assert shell.app.return_code == 0


def test_quit_as_a_command_leaves() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.pilot.press("colon", *"quit", "enter")
        shell.engine.finish()
        await shell.pilot.pause()

    assert drive(test).app.return_code == 0


def test_leaving_with_unsaved_edits_asks_and_saving_answers() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert shell.app.is_running
        assert "The edits of the current model are not saved." in shell.screen
        await shell.press("escape")
        assert isinstance(shell.app.screen, MainScreen)
        await shell.press("ctrl+q", "s")
        assert shell.app.main.command.input.value == "save out"
        await shell.play("save out", "stats save s.npz")
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_a_staged_plan_is_not_left_behind_by_accident_and_twice_is_an_answer() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert "A plan is staged and not applied: staged prune" in shell.screen
        assert shell.app.is_running
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_leaving_names_statistics_steering_branches_and_the_recording() -> None:
    @ready(*APPLIED, "undo", "steer --activate 1:2")
    async def test(shell: Shell) -> None:
        shell.app.state = replace(shell.app.state, recording="s.mlxfun")
        await shell.press("ctrl+q")
        for words in (
            "State 1 of the history is not saved: prune --n-prune 4",
            "Steering is in force",
            "The routing statistics (32 samples) are in no file: stats save FILE.npz",
            "The session is recorded to s.mlxfun",
        ):
            assert words in shell.screen, words
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_another_model_asks_before_it_takes_the_place_of_unsaved_edits() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        async def typed() -> None:
            await shell.press("colon", *"load", "space", *"demo", "enter")

        before = len(shell.app.state.lines)
        for answer in ("escape", "ctrl+q"):
            await typed()
            assert "The edits of the current model are not saved." in shell.screen
            assert "enter load anyway" in shell.screen
            await shell.press(answer)
            assert isinstance(shell.app.screen, MainScreen)
            assert shell.app.is_running
            assert not shell.engine.queue
        await typed()
        await shell.press("enter")
        shell.engine.finish()
        await shell.settle()
        assert shell.app.state.lines[before:] == ("load demo",)
        # A list of models replaces none.
        await shell.press("colon", *"load", "enter")
        assert isinstance(shell.app.screen, MainScreen)

    drive(test)


def test_nothing_is_asked_when_nothing_is_lost() -> None:
    @ready(*CALIBRATED, "stats save s.npz", "chat hello")
    async def test(shell: Shell) -> None:
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


# What was found at the start ------------------------------------------------------------------
LEFT = Notice(
    "offer", "a session of 30 Nov 14:02 on demo was cut short after 23 commands", "resume"
)


def left_behind() -> FakeEngine:
    engine = FakeEngine()
    engine.left = LEFT
    return engine


def test_a_session_that_was_cut_short_is_offered_at_the_top_with_one_key() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        top = shell.screen.splitlines()[0]
        assert "A session of 30 Nov 14:02 on demo was cut short after 23 commands  Y resume" in top
        await shell.press("Y")
        assert shell.engine.lines[-1] == "resume"
        assert "cut short" not in shell.screen.splitlines()[0], "it is being taken"
        shell.engine.finish()
        await shell.settle()
        assert "cut short" not in shell.screen.splitlines()[0]

    drive(test, size=(100, 30), engine=left_behind())


def test_an_offer_can_be_hidden_and_keeps_its_keys_where_it_is_narrow() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        top = shell.screen.splitlines()[0]
        assert top.rstrip().endswith("…  Y resume  X hide")
        await shell.press("X")
        assert "cut short" not in shell.screen.splitlines()[0]
        assert "resume" not in shell.engine.lines

    drive(test, size=(60, 18), engine=left_behind())


def test_a_session_of_another_model_is_no_longer_offered_once_that_is_loaded() -> None:
    engine = FakeEngine()
    engine.left = replace(LEFT, about="demo")

    @ready()
    async def test(shell: Shell) -> None:
        assert [offer.about for offer in shell.app.state.offers] == ["demo"]
        await shell.play("load demo")
        assert shell.app.state.offers
        await shell.play("load /models/another")
        assert not shell.app.state.offers
        assert any("cut short" in entry.text for entry in shell.app.state.log)

    drive(test, engine=engine)
