"""The screen's tests must not depend on whoever runs them."""

from __future__ import annotations

import asyncio
import os

import pytest
from textual._compositor import Compositor


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wishes about colours, speed or drivers from outside."""
    for name in list(os.environ):
        wish = name.startswith("TEXTUAL") and not name.startswith("TEXTUAL_SNAPSHOT")
        if wish or name in ("NO_COLOR", "FORCE_COLOR", "SSH_CONNECTION"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture(autouse=True)
def waiting_ends_with_the_work(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pilot waits until the process uses little processor time, in steps of 20 ms. What these
    tests wait for is that every message is handled, which it waits for as well, and exactly.
    Snapshots are taken at rest, as Textual takes them.
    """

    async def briefly(min_sleep: float = 0.0, max_sleep: float = 1.0) -> None:
        await asyncio.sleep(0.002)

    if request.path.stem != "test_snapshots":
        monkeypatch.setattr("textual.pilot.wait_for_idle", briefly)
        monkeypatch.setattr("textual.app.wait_for_idle", briefly)


@pytest.fixture(autouse=True)
def frames_are_drawn_when_they_are_read(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal Textual draws every frame and throws it away, a third of all work. Here
    the screen is drawn when a test reads it, and at the end of `driving.drive`.
    """

    def undrawn(compositor: Compositor, *_: object, **__: object) -> None:
        compositor._dirty_regions.clear()

    pictures = "snap_compare" in request.fixturenames
    if not pictures and request.path.parent.name != "web":  # a browser reads the frames
        monkeypatch.setattr(Compositor, "render_update", undrawn)
