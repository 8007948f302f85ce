"""The README's pictures, from the real program on the bundled model.

python tests/pictures/make.py         # writes the SVG files beside this one
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from textual.pilot import Pilot

from commands.engine import Engine
from commands.output.render.dispatch import render
from tui.app import ShellApp
from tui.command_history import LineHistory

HERE = Path(__file__).resolve().parent
SIZE = (120, 36)
SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (command lines, keys pressed after them)
    "plan": (
        (
            "collect --dataset demo:mixed --max-samples 40",
            "prune --n-prune 2",
            "preview --dataset demo:eval --max-samples 12",
            "chat --max-tokens 40 What is a loop in Python?",
        ),
        ("escape", "1", "right", "right", "right"),
    ),
    "both": (('ab --max-tokens 40 "What is a loop in Python?"',), ("escape", "1")),
}


async def quiet(engine: Engine, app: ShellApp, pilot: Pilot[int]) -> None:
    """Until no command runs and the screen shows it."""
    while engine.busy or engine.queue or app.state.job is not None:
        await asyncio.sleep(0.05)
        app.pump()
    await pilot.pause()


async def shoot() -> None:
    engine = Engine(seed=1)
    app = ShellApp(engine, startup_lines=["load demo"], renderer=render, lines=LineHistory(None))
    app.animation_level = "none"
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        await quiet(engine, app, pilot)
        for name, (lines, keys) in SCENES.items():
            for line in lines:
                engine.run(line)
                await quiet(engine, app, pilot)
            await pilot.press(*keys)
            await quiet(engine, app, pilot)
            picture = app.export_screenshot(title="mlxfun-shell --demo")
            (HERE / f"{name}.svg").write_text(picture, "utf-8")
    engine.close()


if __name__ == "__main__":
    asyncio.run(shoot())
