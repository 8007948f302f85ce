"""Pictures of the screen: whole at every size and look, each panel alone, and scenes.

After a wanted change: `pytest tests/tui/test_snapshots.py --snapshot-update`, then look at them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, make, still

SESSION = (*STAGED, "steer --activate 1:2 --deactivate 2:9", "preview", "chat 'What are you?'")


def picture(
    lines: tuple[str, ...],
    *keys: str,
    running: str = "",
    steps: int = 0,
    theme: str = "",
    shape: tuple[int, int] = (6, 16),
) -> tuple[Any, Callable[[Pilot[int]], Awaitable[None]]]:
    """An application, and how to bring it to the moment of the picture: `lines` played, `keys`
    pressed, and a `running` line some `steps` on its way. shape: layers and experts."""
    engine = FakeEngine(*shape)
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
        await still(app, pilot)

    return app, prepare


SIZES = [(60, 18), (80, 24), (120, 40), (200, 50)]
LOOKS = ["mlxfun-dark", "mlxfun-light", "mlxfun-contrast", "no colour"]
PANELS = {"experts": "1", "chat": "2", "plan": "3", "history": "4", "log": "5", "mixer": "7"}


def theme_of(look: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The theme to set for a look; terminals without colours have none."""
    if look != "no colour":
        return look
    monkeypatch.setenv("NO_COLOR", "1")
    return ""


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("size", SIZES, ids=[f"{w}x{h}" for w, h in SIZES])
def test_the_whole_screen(
    snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], look: str
) -> None:
    app, prepare = picture(SESSION, theme=theme_of(look, monkeypatch))
    assert snap_compare(app, terminal_size=size, run_before=prepare)


LARGE = [
    ((48, 128), (60, 18), "mlxfun-dark"),
    ((48, 128), (80, 24), "no colour"),
    ((48, 128), (120, 40), "mlxfun-dark"),
    ((48, 128), (200, 50), "mlxfun-light"),
    ((94, 512), (60, 18), "no colour"),
    ((94, 512), (80, 24), "mlxfun-dark"),
    ((94, 512), (120, 40), "mlxfun-contrast"),
    ((94, 512), (200, 50), "mlxfun-dark"),
]


@pytest.mark.parametrize(
    ("shape", "size", "look"), LARGE, ids=[f"{a}x{b}-{w}x{h}-{k}" for (a, b), (w, h), k in LARGE]
)
def test_the_whole_screen_of_a_large_model(
    snap_compare: Any,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    size: tuple[int, int],
    look: str,
) -> None:
    app, prepare = picture(SESSION, theme=theme_of(look, monkeypatch), shape=shape)
    assert snap_compare(app, terminal_size=size, run_before=prepare)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_on_its_own(snap_compare: Any, panel: str) -> None:
    lines = SESSION if panel == "plan" else (*SESSION, "apply")
    app, prepare = picture(lines, PANELS[panel])
    assert snap_compare(app, terminal_size=(60, 18), run_before=prepare)


def test_a_command_line_on_its_way(snap_compare: Any) -> None:
    app, prepare = picture((), "colon", "c", "o", "l")
    assert snap_compare(app, terminal_size=(60, 18), run_before=prepare)


def test_a_calibration_on_its_way(snap_compare: Any) -> None:
    app, prepare = picture((), running="collect --dataset demo:mixed", steps=5)
    assert snap_compare(app, terminal_size=(80, 24), run_before=prepare)


def test_the_first_sight_of_a_loaded_model(snap_compare: Any) -> None:
    app, prepare = picture(())
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
    "form": (
        (*CALIBRATED, "prune --n-prune 2"),
        ("f4", *"prune", "space", *"stage", "enter", "down"),
    ),
    "models": ((), ("colon", *"load", "enter")),
    "report": ((*STAGED, "preview"), ("5", "up", "enter", "slash", *"prune", "enter")),
    "large map": ((*STAGED, "chat hello"), ("Z",)),
    "both tokens": (
        (*STAGED, "ab 'What is for breakfast?'"),
        ("2", "escape", "right", "right", "o"),
    ),
    "sorted": ((*STAGED, "apply", "name 1 small"), ("4", "space", "1", "S", "end")),
}
SHOTS = [
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
    ("form", (80, 24), "mlxfun-dark"),
    ("form", (60, 18), "no colour"),
    ("models", (120, 40), "mlxfun-light"),
    ("report", (80, 24), "no colour"),
    ("large map", (200, 50), "mlxfun-dark"),
    ("both tokens", (120, 40), "mlxfun-contrast"),
]


@pytest.mark.parametrize(
    ("scene", "size", "look"), SHOTS, ids=[f"{s}-{w}x{h}-{k}" for s, (w, h), k in SHOTS]
)
def test_a_scene(
    snap_compare: Any, monkeypatch: pytest.MonkeyPatch, scene: str, size: tuple[int, int], look: str
) -> None:
    lines, keys = SCENES[scene]
    app, prepare = picture(lines, *keys, theme=theme_of(look, monkeypatch))

    async def ready(pilot: Pilot[int]) -> None:
        await prepare(pilot)
        app.engine.finish()  # type: ignore[attr-defined]
        await still(app, pilot)

    assert snap_compare(app, terminal_size=size, run_before=ready)
