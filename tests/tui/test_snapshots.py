"""A few pictures of the screen. Small and smooth on purpose: strips are tested in words elsewhere.

After a wanted change: `pytest tests/tui/test_snapshots.py --snapshot-update`, then look at them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, make

SESSION = (*STAGED, "steer --activate 1:2 --deactivate 2:9", "preview", "chat 'What are you?'")


def picture(
    lines: tuple[str, ...], *keys: str, running: str = "", steps: int = 0, theme: str = ""
) -> tuple[Any, Callable[[Pilot[int]], Awaitable[None]]]:
    """An application, and how to bring it to the moment of the picture: `lines` played, `keys`
    pressed, and a `running` line some `steps` on its way."""
    engine = FakeEngine()
    app = make(engine)
    app.animation_level = "none"

    async def prepare(pilot: Pilot[int]) -> None:
        await pilot.pause()
        engine.finish()
        engine.play(*lines)
        await pilot.pause()
        if theme:
            app.theme = theme
        await pilot.press(*keys)
        if running:
            engine.run(running)
            engine.step(steps)
        app.pump()
        await pilot.pause()
        await pilot.pause()

    return app, prepare


@pytest.mark.parametrize(
    ("size", "name"),
    [((80, 24), "80x24"), ((120, 40), "120x40"), ((60, 18), "60x18"), ((200, 50), "200x50")],
)
def test_a_staged_plan(snap_compare: Any, size: tuple[int, int], name: str) -> None:
    app, prepare = picture(SESSION)
    assert snap_compare(app, terminal_size=size, run_before=prepare)


def test_a_calibration_on_its_way(snap_compare: Any) -> None:
    app, prepare = picture((), running="collect --dataset demo:mixed", steps=5)
    assert snap_compare(app, terminal_size=(80, 24), run_before=prepare)


def test_the_first_sight_of_a_loaded_model(snap_compare: Any) -> None:
    app, prepare = picture(())
    assert snap_compare(app, terminal_size=(80, 24), run_before=prepare)


def test_without_colour(snap_compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app, prepare = picture(SESSION)
    assert snap_compare(app, terminal_size=(80, 24), run_before=prepare)


def test_on_a_light_terminal(snap_compare: Any) -> None:
    app, prepare = picture(SESSION, theme="mlxfun-light")
    assert snap_compare(app, terminal_size=(80, 24), run_before=prepare)


def test_the_table_twin(snap_compare: Any) -> None:
    app, prepare = picture(SESSION, "y")
    assert snap_compare(app, terminal_size=(120, 40), run_before=prepare)


# Scenes: lines played before, keys pressed. At one size each, and all looks between them.
SCENES = {
    "picking": ((*CALIBRATED,), ("right", "C", "space", "down", "shift+right", "shift+down")),
    "both sides": ((*STAGED, "ab 'What is for breakfast?'"), ("2",)),
    "mixer": ((*CALIBRATED, "steer --activate 1:2 --deactivate 2:9 --level 3:4=6,0:7=-3"), ("7",)),
    "dossier": ((*CALIBRATED, "chat hello"), ("right", "W")),
    "layer": ((*STAGED, "steer --activate 1:2 --deactivate 1:9"), ("down", "enter", "down", "S")),
    "tokens": ((*CALIBRATED, "chat 'What are you?'"), ("B", "i", "escape", "right")),
    "difference": ((*CALIBRATED, "stats diff a.npz b.npz"), ("1",)),
    "sorted": ((*STAGED, "apply", "name 1 small"), ("4", "space", "1", "S", "end")),
}
LOOKS = [
    ("picking", (80, 24), "mlxfun-dark"),
    ("both sides", (80, 24), "mlxfun-light"),
    ("mixer", (80, 24), "mlxfun-dark"),
    ("mixer", (60, 18), "no colour"),
    ("dossier", (80, 24), "mlxfun-dark"),
    ("layer", (80, 24), "mlxfun-dark"),
    ("layer", (120, 40), "no colour"),
    ("tokens", (80, 24), "mlxfun-light"),
    ("difference", (80, 24), "mlxfun-dark"),
    ("sorted", (120, 40), "mlxfun-contrast"),
]


@pytest.mark.parametrize(
    ("scene", "size", "look"), LOOKS, ids=[f"{s}-{w}x{h}-{k}" for s, (w, h), k in LOOKS]
)
def test_a_scene(
    snap_compare: Any, monkeypatch: pytest.MonkeyPatch, scene: str, size: tuple[int, int], look: str
) -> None:
    if look == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
    lines, keys = SCENES[scene]
    app, prepare = picture(lines, *keys, theme="" if look == "no colour" else look)

    async def ready(pilot: Pilot[int]) -> None:
        await prepare(pilot)
        app.engine.finish()  # type: ignore[attr-defined]
        app.pump()
        await pilot.pause()

    assert snap_compare(app, terminal_size=size, run_before=ready)
