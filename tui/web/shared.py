"""One application for all tabs: what it draws goes to each of them, and each may type.

The application is as large as the smallest of them. A tab that cannot keep up is hung up on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from textual import events
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.driver import Driver
from textual.geometry import Size
from textual.message import Message

PREAMBLE = "\x1b[?1049h\x1b[?1000h\x1b[?1003h\x1b[?1006h\x1b[?2004h\x1b[?25l\x1b[2J"
"""Alternate screen, mouse, bracketed paste, no cursor, nothing on it: what each new tab is told."""

FIRST = Size(120, 40)
SMALLEST, LARGEST = Size(20, 6), Size(500, 200)
WAITING_BYTES = 8 << 20
ESCAPE_SECONDS = 0.1
"""After so long an Escape is one, and not the beginning of another key."""


class Tab:
    """One connection. send, close: of its socket. size: of its terminal."""

    def __init__(
        self,
        send: Callable[[bytes], Awaitable[None]],
        close: Callable[[], Awaitable[Any]],
        size: Size,
    ) -> None:
        self.size = size
        self._send, self._close = send, close
        self._waiting = 0
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._pump = asyncio.create_task(self._run())

    def put(self, data: bytes) -> bool:
        """Send something soon; whether the tab keeps up."""
        self._waiting += len(data)
        self._queue.put_nowait(data)
        return self._waiting <= WAITING_BYTES

    async def _run(self) -> None:
        while True:
            data = await self._queue.get()
            await self._send(data)
            self._waiting -= len(data)

    async def close(self) -> None:
        """Hang up."""
        self._pump.cancel()
        await self._close()

    def leave(self) -> None:
        """It is gone."""
        self._pump.cancel()


class SharedScreen:
    """The application's side of the tabs. Lives on its event loop."""

    def __init__(self, app: App[Any]) -> None:
        self.app = app
        self.tabs: set[Tab] = set()
        self._driver: BrowserDriver | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def drive(self, *given: Any, **more: Any) -> Driver:
        """Make the application's driver; Textual calls this in place of a class."""
        self._driver = BrowserDriver(self, *given, **more)
        return self._driver

    def join(self, tab: Tab) -> None:
        """Show the screen in a new tab too."""
        self.tabs.add(tab)
        self._put(tab, PREAMBLE.encode())
        self.resized(tab, tab.size)

    def leave(self, tab: Tab) -> None:
        """A tab was closed."""
        tab.leave()
        self.tabs.discard(tab)
        if self.tabs:
            self._fit()

    def resized(self, tab: Tab, size: Size) -> None:
        """A tab has another size."""
        width = min(max(size.width, SMALLEST.width), LARGEST.width)
        height = min(max(size.height, SMALLEST.height), LARGEST.height)
        tab.size = Size(width, height)
        self._fit()

    def _fit(self) -> None:
        """Take the size that all tabs have room for, and draw everything anew."""
        width = min(tab.size.width for tab in self.tabs)
        height = min(tab.size.height for tab in self.tabs)
        if self._driver is not None:
            self._driver.resize(Size(width, height))

    def type(self, text: str) -> None:
        """Keys and mouse of some tab, as terminals send them."""
        if self._driver is not None:
            self._driver.feed(text)

    def write(self, data: str) -> None:
        """Send what the application draws to every tab."""
        for tab in tuple(self.tabs):
            self._put(tab, data.encode("utf-8", "replace"))

    def _put(self, tab: Tab, data: bytes) -> None:
        if not tab.put(data):
            self.tabs.discard(tab)
            task = asyncio.get_running_loop().create_task(tab.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def end(self) -> None:
        """The application has ended."""
        await asyncio.gather(*(tab.close() for tab in self.tabs), return_exceptions=True)


class BrowserDriver(Driver):
    """Textual's driver over the tabs, inside this process."""

    def __init__(
        self,
        shared: SharedScreen,
        app: App[Any],
        *,
        debug: bool = False,
        mouse: bool = True,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size or FIRST)
        self._shared = shared
        self._parser = XTermParser(debug=debug)

    @property
    def is_web(self) -> bool:
        return True

    def write(self, data: str) -> None:
        self._shared.write(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def start_application_mode(self) -> None:
        size = Size(*(self._size or FIRST))
        self.send_message(events.Resize(size, size))

    def disable_input(self) -> None:
        """Tabs are hung up on by the server."""

    def stop_application_mode(self) -> None:
        """Tabs are hung up on by the server."""

    def resize(self, size: Size) -> None:
        """Another size, or another tab: everything is drawn anew."""
        self._shared.write("\x1b[2J")
        self._size = size
        self.send_message(events.Resize(size, size))
        # A resize to the same size draws nothing.
        self._loop.call_later(0, lambda: self._app.refresh(layout=True))

    def feed(self, text: str) -> None:
        """Input as a terminal sends it."""
        for message in self._parser.feed(text):
            self._take(message)
        self._loop.call_later(ESCAPE_SECONDS, self._tick)

    def _tick(self) -> None:
        for message in self._parser.tick():
            self._take(message)

    def _take(self, message: Message) -> None:
        self.process_message(message)
