"""Cancelling a job, and leaving the shell."""

from __future__ import annotations

import pytest

from tests.tui.driving import APPLIED, STAGED, Shell, drive, ready


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


def test_leaving_with_unsaved_edits_is_asked_once() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert shell.app.is_running
        assert shell.echo == "! the edits are not saved: s saves, ^q again leaves"
        await shell.play("save out")
        shell.app._leaving = float("-inf")
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_a_staged_plan_is_not_left_behind_by_accident_and_twice_is_an_answer() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert "a plan is staged and not applied" in shell.echo
        assert shell.app.is_running
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0
