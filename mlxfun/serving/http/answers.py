"""Sends answers: whole ones as JSON, others as server-sent events; and notices who is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.flow import Delta, Turn, flow, whole
from mlxfun.serving.http.tickets import Gone, Ticket
from mlxfun.serving.options import LOOPBACK
from mlxfun.serving.service import Service
from mlxfun.text import one_line

log = logging.getLogger(__name__)

HEADER_SECONDS = 10.0
"""How long the headers of a stream wait for the state that answers."""

KEEP_ALIVE_SECONDS = 10.0
"""After so long without news a comment is sent, or proxies and clients give up."""

NAME = 40
"""Characters of a client's name."""

SEND_SECONDS = 30.0
"""A client that takes nothing for so long is gone."""


class Abandoned(Protocol):
    """What a client leaves behind."""

    def abandon(self) -> None:
        """The client is gone."""


Worded = Callable[[Delta], bytes]
"""Words a delta as events."""


class Wording:
    """How one API words an answer. `begin` and `end` frame a stream."""

    keep_alive = b": keep-alive\n\n"

    def begin(self, ticket: Ticket) -> bytes:
        """The first events."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """What is new."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The last events, when all of the answer is said."""
        return b""

    def failed(self, problem: Bad) -> bytes:
        """The last event of a stream that fails."""
        raise NotImplementedError

    def whole(self, delta: Delta, ticket: Ticket) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        raise NotImplementedError


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {text}\n\n".encode()


def state_headers(ticket: Ticket) -> dict[str, str]:
    """Headers that name what answers; "pending" where a stream began before that was known."""
    admitted = ticket.admitted
    if admitted is None:
        return {"x-mlxfun-state": "pending"}
    found = {"x-mlxfun-state": admitted.state, "x-mlxfun-side": admitted.side}
    return found | ({"x-mlxfun-steering": admitted.steering} if admitted.steering else {})


async def respond(
    request: Request, service: Service, turn: Turn, wording: Wording, stream: bool
) -> Response:
    """Ask for one answer and word it. Raises Bad, Gone."""
    ticket = Ticket(service, turn.ask, client_of(request))
    with ticket:
        if stream:
            async with watched(request.receive, ticket):
                await ticket.begun(HEADER_SECONDS)
            return EventStream(ticket.kept(), turn, wording)
        async with watched(request.receive, ticket):
            delta = await whole(ticket, turn)
        return JSONResponse(wording.whole(delta, ticket), headers=state_headers(ticket))


def client_of(request: Request) -> str:
    """What a client calls itself, and where it asks from."""
    name = request.headers.get("user-agent", "").split("(")[0].strip()
    shown = one_line("".join(c for c in name if c.isprintable()))[:NAME].strip()
    host = request.client.host if request.client is not None else ""
    elsewhere = f"@{host}" if host not in ("", *LOOPBACK) else ""
    return f"{shown or 'a client'}{elsewhere}"


@asynccontextmanager
async def watched(receive: Receive, ticket: Abandoned) -> AsyncIterator[None]:
    """Inside the block, a client that hangs up gives its slot back at once."""
    watcher = asyncio.create_task(_disconnect(receive))
    watcher.add_done_callback(lambda task: None if task.cancelled() else ticket.abandon())
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Streams an answer that has been asked for."""

    def __init__(self, ticket: Ticket, turn: Turn, wording: Wording) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **state_headers(ticket),
        }
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._ticket, self._turn, self._wording = ticket, turn, wording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Whatever happens, the slot is free afterwards."""
        try:
            async with watched(receive, self._ticket):
                await self._send(send)
        except Gone:
            log.debug("a client went away")
        finally:
            self._ticket.abandon()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        await send_body(send, self._wording.begin(self._ticket))
        sent = monotonic()
        try:
            async for delta in flow(self._ticket, self._turn, KEEP_ALIVE_SECONDS):
                words = self._wording.delta(delta) if delta is not None else b""
                if not words and monotonic() - sent >= KEEP_ALIVE_SECONDS:
                    words = self._wording.keep_alive  # a long prompt is read, or others wait
                if words:
                    await send_body(send, words)
                    sent = monotonic()
            await send_body(send, self._wording.end())
        except Bad as problem:
            await send_body(send, self._wording.failed(problem))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_body(send: Callable[[dict[str, Any]], Awaitable[None]] | Send, words: bytes) -> None:
    """Send some bytes. Raises Gone if the client does not take them."""
    if not words:
        return
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": words, "more_body": True})
    except (TimeoutError, OSError):
        raise Gone from None
