"""Several answers to one request (`n`): each is a request of its own to the model, whose prompt the
first of them reads."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlxfun.serving.ask import Ask
from mlxfun.serving.http.answers import (
    HEADER_SECONDS,
    KEEP_ALIVE_SECONDS,
    EventStream,
    client_of,
    respond,
    send_body,
    state_headers,
    watched,
)
from mlxfun.serving.http.apis.chat import OpenAIWording
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.flow import Delta, Turn, flow, whole
from mlxfun.serving.http.sampling import SEEDS
from mlxfun.serving.http.tickets import Gone, Ticket
from mlxfun.serving.service import Service

_groups = itertools.count(1)


async def respond_several(
    request: Request, service: Service, turn: Turn, wording: OpenAIWording, stream: bool
) -> Response:
    """Ask for as many answers as are wanted, and word them. Raises Bad, Gone."""
    if turn.answers == 1:
        return await respond(request, service, turn, wording, stream)
    tickets = [Ticket(service, ask, client_of(request)) for ask in _asks(turn)]
    wordings = [wording.like(index) for index in range(turn.answers)]
    async with _all(tickets):
        async with _watched(request.receive, tickets):
            await tickets[0].begun(HEADER_SECONDS)
            deltas = [] if stream else await _gathered(tickets, turn)
        if stream:
            return SeveralStreams([ticket.kept() for ticket in tickets], turn, wordings)
        found = [w.whole(d, t) for w, d, t in zip(wordings, deltas, tickets, strict=True)]
        return JSONResponse(_joined(found), headers=state_headers(tickets[0]))


def _asks(turn: Turn) -> list[Ask]:
    """The same request with other random numbers: a seed counts up."""
    sampling = turn.ask.sampling
    seeds = [
        None if sampling.seed is None else (sampling.seed + n) % SEEDS for n in range(turn.answers)
    ]
    group = next(_groups)
    return [replace(turn.ask, sampling=replace(sampling, seed=seed), group=group) for seed in seeds]


@asynccontextmanager
async def _all(tickets: list[Ticket]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for ticket in tickets:
            stack.enter_context(ticket)
        yield


@asynccontextmanager
async def _watched(receive: Receive, tickets: list[Ticket]) -> AsyncIterator[None]:
    """Inside the block, a client that hangs up gives all slots back at once."""

    class Both:
        def abandon(self) -> None:
            for ticket in tickets:
                ticket.abandon()

    async with watched(receive, Both()):
        yield


async def _gathered(tickets: list[Ticket], turn: Turn) -> list[Delta]:
    """All answers. Raises Bad or Gone as soon as one of them does."""
    tasks = [asyncio.create_task(whole(ticket, turn)) for ticket in tickets]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One body of several."""
    usage = dict(found[0]["usage"])
    usage["completion_tokens"] = sum(one["usage"]["completion_tokens"] for one in found)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return found[0] | {"choices": [one["choices"][0] for one in found], "usage": usage}


class SeveralStreams(EventStream):
    """Streams several answers in one, as they come."""

    def __init__(self, tickets: list[Ticket], turn: Turn, wordings: list[OpenAIWording]) -> None:
        super().__init__(tickets[0], turn, wordings[0])
        self._tickets, self._wordings = tickets, wordings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Whatever happens, the slots are free afterwards."""
        try:
            async with _watched(receive, self._tickets):
                await self._send(send)
        except Gone:
            pass
        finally:
            for ticket in self._tickets:
                ticket.abandon()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sent = monotonic()

        async def say(words: bytes) -> None:
            nonlocal sent
            if words:
                sent = monotonic()
                await send_body(send, words)

        async def one(ticket: Ticket, wording: OpenAIWording) -> None:
            await say(wording.begin(ticket))
            async for delta in flow(ticket, self._turn, KEEP_ALIVE_SECONDS):
                words = wording.delta(delta) if delta is not None else b""
                if not words and monotonic() - sent >= KEEP_ALIVE_SECONDS:
                    words = wording.keep_alive
                await say(words)

        pairs = zip(self._tickets, self._wordings, strict=True)
        tasks = [asyncio.create_task(one(*pair)) for pair in pairs]
        try:
            await asyncio.gather(*tasks)
            await say(self._wordings[0].end_of(self._wordings))
        except Bad as problem:
            await say(self._wordings[0].failed(problem))
        finally:
            for task in tasks:
                task.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
