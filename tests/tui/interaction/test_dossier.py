"""What experts serve, on the screen; and the window of an expert, which the arrows move on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tui.screen import MainScreen
from tui.widgets.experts.dossier_screen import DossierScreen


def with_topics(shell: Shell, topics: dict[tuple[int, int], str]) -> None:
    view = shell.app.state.view
    heat = replace(view.heat, topics=topics)
    shell.engine._view = replace(view, heat=heat)
    shell.app.state = replace(shell.app.state, view=shell.engine._view)
    shell.app._show()


def test_topics_stand_on_the_cursor_line_and_in_the_layer() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        with_topics(shell, {(0, 0): "Solidity", (0, 4): "numbers"})
        await shell.settle()
        assert "L0:E0 · Solidity · reap_sum" in shell.screen
        await shell.press("right", "right", "right")
        assert "L0:E3 never seen" in shell.screen
        await shell.press("enter", "z")
        assert "serves" in shell.screen
        lines = [line for line in shell.screen.splitlines() if "numbers" in line]
        assert any("E4" in line for line in lines)

    drive(test, size=(120, 40))


def test_an_expert_that_was_never_seen_has_no_topic() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        with_topics(shell, {(0, 3): "ghosts"})
        await shell.press("right", "right", "right")
        assert "L0:E3 never seen" in shell.screen
        assert "ghosts" not in shell.screen
        await shell.press("enter", "z")
        assert "ghosts" not in shell.screen

    drive(test, size=(120, 40))


def test_the_arrows_go_on_to_the_next_expert_that_is_left() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        view = shell.app.state.view
        alive = np.array(view.heat.alive)
        alive[0, 1] = False
        shell.engine._view = replace(view, heat=replace(view.heat, alive=alive))
        await shell.press("W")
        shell.engine.finish()
        await shell.settle()
        assert "layer 0, expert 0" in shell.screen
        assert "not significant" in shell.screen
        await shell.press("right")
        assert shell.engine.lines[-1] == "dossier 0:2"
        assert "looking at 0:2" in shell.screen
        shell.engine.finish()
        await shell.settle()
        assert isinstance(shell.app.screen, DossierScreen)
        assert "layer 0, expert 2" in shell.screen
        assert shell.app.state.cursor == (0, 2)
        await shell.press("left", "left")
        assert shell.engine.lines[-1] == "dossier 0:15"
        # A window that was closed does not come back with its report.
        await shell.press("escape")
        shell.engine.finish()
        await shell.settle()
        assert isinstance(shell.app.screen, MainScreen)

    drive(test)
