"""What the screen's tests share: a shell on a fake engine, with a clock that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from textual.pilot import Pilot

from commands.config import Config
from tests.fake_engine import FakeEngine
from tui.app import ShellApp
from tui.command_history import LineHistory

Drive = Callable[["Shell"], Awaitable[None]]


async def still(app: ShellApp, pilot: Pilot[int], tries: int = 20) -> None:
    """Let the screen take in everything that has happened, until it shows the same twice: on a busy
    machine one pause may end ahead of a layout."""
    before: list[str] = []
    for _ in range(tries):
        app.pump()
        await pilot.pause()
        strips = app.screen._compositor.render_strips()
        now = ["".join(segment.text for segment in strip) for strip in strips]
        if now == before:
            return
        before = now


class Shell:
    """An application under test with its engine and its pilot."""

    def __init__(self, engine: FakeEngine, app: ShellApp, pilot: Pilot[int]) -> None:
        self.engine, self.app, self.pilot = engine, app, pilot

    async def play(self, *lines: str) -> None:
        """Run command lines to their end and let the screen follow."""
        self.engine.finish()
        self.engine.play(*lines)
        await self.settle()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settle()

    async def settle(self) -> None:
        """Let the screen take in everything that has happened."""
        await self.pilot.pause()
        self.app.pump()
        await self.pilot.pause()

    @property
    def screen(self) -> str:
        """All that can be read on the screen, line by line."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)

    async def until(self, holds: Callable[[], bool], tries: int = 50) -> None:
        """Let the screen go on until `holds`: what appears is laid out, and scrolled only then."""
        for _ in range(tries):
            if holds():
                return
            await self.settle()
        assert holds(), "it never came to that"

    @property
    def echo(self) -> str:
        """What the echo line says."""
        return str(self.app.main.query_one("#echo").visual)


def clock() -> float:
    """A clock that always says 100 seconds."""
    return 100.0


def make(
    engine: FakeEngine,
    lines: Path | None = None,
    now: Callable[[], float] = clock,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> ShellApp:
    """The application on `engine`, remembering command lines in `lines`. keys: the user's own."""
    return ShellApp(
        engine,
        startup_lines=["load demo"],
        lines=LineHistory(lines),
        clock=now,
        config=Config(keys=keys),
    )


def drive(
    test: Drive,
    *,
    size: tuple[int, int] = (160, 45),
    engine: FakeEngine | None = None,
    lines: Path | None = None,
    now: Callable[[], float] = clock,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> Shell:
    """Run `test` against a shell of `size`; returns the shell, its application ended."""
    engine = engine or FakeEngine()

    async def body() -> Shell:
        app = make(engine, lines, now, keys)
        async with app.run_test(size=size) as pilot:
            shell = Shell(engine, app, pilot)
            await shell.settle()
            await test(shell)
            app.screen._compositor.render_strips()  # what cannot be drawn fails here
        return shell

    return asyncio.run(body())


def ready(*lines: str) -> Callable[[Drive], Drive]:
    """A decorator: the demo model is loaded and `lines` have run when the test begins."""

    def wrap(test: Drive) -> Drive:
        async def prepared(shell: Shell) -> None:
            await shell.play(*lines)
            await test(shell)

        return prepared

    return wrap


CALIBRATED = ("collect --dataset demo:mixed",)
STAGED = (*CALIBRATED, "prune --n-prune 4")
APPLIED = (*STAGED, "apply")


def text_of(shell: Shell, widget: type) -> str:
    """What a widget of lines shows, as plain text."""
    found = shell.app.main.query_one(widget)
    lines = [found.render_line(y).text.rstrip() for y in range(found.size.height)]
    return "\n".join(lines).rstrip()
