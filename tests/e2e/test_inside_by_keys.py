"""On the screen, by keys alone: at which layer an answer appears, and which expert wrote it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from textual.pilot import Pilot

from commands.config import Config
from commands.engine import Engine
from tui.app import ShellApp
from tui.command_history import LineHistory
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.inside.map_screen import MapScreen


def text(app: ShellApp) -> str:
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


async def until(pilot: Pilot[int], holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        await pilot.pause(0.05)
    assert holds(), "it never came to that"


def test_the_layer_of_an_answer_and_the_expert_that_wrote_it_are_found_by_keys() -> None:
    engine = Engine(seed=0)
    app = ShellApp(engine, startup_lines=["load demo"], lines=LineHistory(None), config=Config())

    async def play() -> None:
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, lambda: app.state.view.model is not None and app.state.job is None)
            await pilot.press("V", *"def add(a, b):", "enter")
            await until(pilot, lambda: isinstance(app.screen, MapScreen))
            await pilot.pause()
            seen = text(app)
            assert "the model's answer is ranked first from layer" in seen
            assert "layer 5, after" in seen
            await pilot.press("down", "down")
            await pilot.pause()
            assert "layer 3, after" in text(app)
            await pilot.press("up", "up", "enter")
            await until(pilot, lambda: isinstance(app.screen, HelpScreen))
            await pilot.pause()
            seen = text(app)
            assert "who wrote" in seen
            assert "expert" in seen
            await pilot.press("escape")
            await pilot.pause()
            # The text twins of both are in the reports.
            kinds = [entry.report.kind for entry in app.state.log if entry.report is not None]
            assert kinds[-2:] == ["lens", "attribution"]

    try:
        asyncio.run(play())
    finally:
        engine.close()
