"""Serves the screen to browsers, by textual-serve's page, scripts and protocol.

textual-serve itself starts one process for each tab, and lets anybody in. Here every tab shows the
one application of this process, which has the one session.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from aiohttp import WSMsgType, web
from rich.console import RenderableType
from textual import constants
from textual.geometry import Size
from textual_serve.server import Server

from commands.config import Config
from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.serving.options import Address
from tui.app import DEFAULT_CONFIG, ShellApp, application, full_report
from tui.ports import Engine
from tui.web.guard import HEADERS, Asked, refusal
from tui.web.shared import SharedScreen, Tab

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

    from commands.start import Web

MESSAGE_BYTES = 1 << 20
TITLE = "mlxfun"


class WebServer(Server):  # type: ignore[misc]
    """textual-serve's server with a guard at the door, and one application behind it."""

    def __init__(self, shared: SharedScreen, address: Address, secret: str) -> None:
        super().__init__("", address.host, address.port, TITLE)
        self._shared, self._address, self._secret = shared, address, secret
        self._cookie = f"mlxfun_{address.port}"

    async def _make_app(self) -> web.Application:
        app: web.Application = await super()._make_app()
        app.middlewares.append(self._guarded())
        return app

    async def on_startup(self, app: web.Application) -> None:
        """The address is told by who starts it."""

    def _guarded(self) -> Any:
        @web.middleware  # type: ignore[untyped-decorator]
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            asked = self._asked(request)
            wrong = refusal(asked, self._address, self._secret)
            if wrong is not None:
                return web.Response(status=wrong.status, text=f"{wrong.message}\n", headers=HEADERS)
            if asked.token and request.path == "/":
                return self._taken()
            try:
                found = await handler(request)
            except web.HTTPException as problem:
                problem.headers.update(HEADERS)
                raise
            if not found.prepared:
                found.headers.update(HEADERS)
            return found

        return guarded

    def _asked(self, request: web.Request) -> Asked:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        return Asked(
            host=request.headers.get("host", ""),
            origin=request.headers.get("origin", ""),
            token=request.query.get("token", ""),
            cookie=request.cookies.get(self._cookie, ""),
            bearer=bearer if scheme.lower() == "bearer" else "",
            socket=request.path == "/ws",
        )

    def _taken(self) -> web.Response:
        """The token goes from the address into a cookie, so that it is in no history or log."""
        found = web.Response(status=303, headers={**HEADERS, "location": "/"})
        found.set_cookie(self._cookie, self._secret, httponly=True, samesite="Strict", path="/")
        return found

    async def handle_index(self, request: web.Request) -> Any:
        """The page, with addresses of the host by which it was asked for."""
        self.public_url = f"{request.scheme}://{request.host}"
        return await super().handle_index(request)

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """A tab: it is shown the screen, and types into it."""
        opened = web.WebSocketResponse(heartbeat=15, max_msg_size=MESSAGE_BYTES)
        await opened.prepare(request)
        size = Size(
            _number(request.query.get("width"), 80), _number(request.query.get("height"), 24)
        )
        tab = Tab(opened.send_bytes, opened.close, size)
        self._shared.join(tab)
        try:
            async for message in opened:
                if message.type == WSMsgType.TEXT and not await self._took(
                    message.data, tab, opened
                ):
                    await opened.close()
        except ConnectionError:
            pass
        finally:
            self._shared.leave(tab)
        return opened

    async def _took(self, data: str, tab: Tab, opened: web.WebSocketResponse) -> bool:
        """Do what a message of the page's script says; whether it was one."""
        try:
            kind, *more = json.loads(data)
            value = more[0] if more else None
            if kind == "stdin":
                self._shared.type(str(value))
            elif kind == "resize" and isinstance(value, dict):
                self._shared.resized(tab, Size(int(value["width"]), int(value["height"])))
            elif kind == "ping":
                await opened.send_json(["pong", value])
        except (ValueError, TypeError, KeyError):
            return False
        return True


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 6 else otherwise


def run(
    engine: Engine,
    wanted: Web,
    *,
    startup_lines: Sequence[str] = (),
    renderer: Callable[[Report], RenderableType] = full_report,
    config: Config = DEFAULT_CONFIG,
    told: Callable[[str], None] = lambda _: None,
) -> int:
    """Serve the screen until somebody quits in it, or a signal comes; the exit code.

    told: called with the address that opens it, once it listens. Raises UsageError for an address that is taken.
    """
    # There is no terminal of ours whose colours could be asked for.
    vars(constants)["COLOR_SYSTEM"] = "truecolor"
    app = application(engine, startup_lines=startup_lines, renderer=renderer, config=config)
    with _listening(wanted.address) as listening:
        return asyncio.run(_served(app, wanted, listening, told))


async def _served(
    app: ShellApp, wanted: Web, listening: socket.socket, told: Callable[[str], None]
) -> int:
    shared = SharedScreen(app)
    app.driver_class = cast(Any, shared.drive)
    host, port = listening.getsockname()[:2]
    address = Address(wanted.address.host or host, port)
    server = WebServer(shared, address, wanted.token)
    runner = web.AppRunner(await server._make_app(), access_log=None, handle_signals=False)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    told(f"http://{address}/?token={wanted.token}")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # ValueError: not on the main thread, where a test has it.
        with suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, app.exit)
    try:
        code = await app.run_async(mouse=True)
        return app.return_code or code or 0
    finally:
        await shared.end()
        await runner.cleanup()


def _listening(address: Address) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((address.host, address.port))
        opened.listen()
    except OSError as problem:
        opened.close()
        reason = problem.strerror or str(problem)
        raise UsageError(f"cannot serve at {address}: {reason}; choose another port") from None
    return opened
