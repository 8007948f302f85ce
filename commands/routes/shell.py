"""The shell over HTTP: its state, history and staged plan, its commands, and its events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from commands import registry
from commands.output.as_json import finite, report_json
from commands.routes.runner import Runner
from mlxfun.errors import UsageError
from mlxfun.events import Event, JobEnded, JobStarted, Notice, Progress, RoutingFrame, Token
from mlxfun.report import plain
from mlxfun.serving.http.answers import event as sse
from mlxfun.serving.http.app import Desk, guarded
from mlxfun.serving.http.errors import Bad

LISTENERS = 16
WAITING = 1000
"""Events that wait for a slow listener; the oldest are dropped."""

KEEP_ALIVE_SECONDS = 2.0
REFUSED = ("quit", "record", "resume")
"""Commands that are the business of whoever sits at the shell."""


class Shell:
    """State, history, plan, commands and events below /v1/mlxfun."""

    def __init__(self, runner: Runner, desk: Desk) -> None:
        self._runner, self._engine, self._desk = runner, runner.engine, desk
        self._ears: list[_Ear] = []
        self._engine.subscribe(self._hear)

    def routes(self) -> list[Route]:
        """All of them."""
        table = (
            ("state", "GET", self._state),
            ("history", "GET", self._history),
            ("plan", "GET", self._plan),
            ("commands", "POST", self._command),
            ("events", "GET", self._events),
        )
        return [
            Route(f"/v1/mlxfun/{name}", guarded(handler), methods=[method])
            for name, method, handler in table
        ]

    async def _state(self, _request: Request) -> Response:
        view, card = self._engine.view(), self._desk.card()
        figures = self._desk.service.figures()
        return JSONResponse(
            {
                "model": card.model,
                "state": card.state,
                "sides": dict(card.sides),
                "live": card.live,
                "steering": finite(view.steering.data()) if view.steering is not None else None,
                "counting": view.counting,
                "busy": self._engine.busy,
                "queue": list(self._engine.queue),
                "requests": {"in_flight": figures.in_flight, "waiting": figures.waiting},
                "info": finite(view.model.data()) if view.model is not None else None,
            }
        )

    async def _history(self, _request: Request) -> Response:
        self._desk.card()
        history = self._engine.view().history
        return JSONResponse(finite(history.data()) if history is not None else {"nodes": []})

    async def _plan(self, _request: Request) -> Response:
        self._desk.card()
        plan = self._engine.view().plan
        return JSONResponse({"plan": finite(plan.data()) if plan is not None else None})

    async def _command(self, request: Request) -> Response:
        if not self._desk.options.commands:
            raise Bad(
                "clients may not run commands here; start with --allow-commands to let them",
                status=403,
            )
        fields = await self._desk.fields(request)
        line = fields.text("command", None, 1 << 20)
        if not line or not line.strip():
            raise Bad("command is missing: the line as it is typed in the shell", "command")
        try:
            name = registry.parse(line.strip()).command.name
        except UsageError as problem:
            raise Bad(str(problem), "command") from None
        if name in REFUSED:
            raise Bad(f"{name} is for whoever sits at the shell", "command", 403)
        ended = await self._runner.run(line)
        return JSONResponse(report_json(ended), 200 if ended.error is None else 409)

    # -- events ----------------------------------------------------------------------------------

    async def _events(self, _request: Request) -> Response:
        if len(self._ears) >= LISTENERS:
            raise Bad(f"{LISTENERS} listeners are there already", status=429)
        return StreamingResponse(
            self._heard(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    async def _heard(self) -> AsyncIterator[bytes]:
        ear = _Ear(asyncio.get_running_loop())
        self._ears = [*self._ears, ear]
        try:
            yield b": listening\n\n"
            while not self._desk.service.stopping:
                for found in await ear.take():
                    yield sse(found, str(found["event"]))
                if ear.silent:
                    yield b": keep-alive\n\n"
        finally:
            self._ears = [other for other in self._ears if other is not ear]

    def _hear(self, event: Event) -> None:
        """Called on the worker's thread."""
        ears = self._ears
        if not ears:
            return
        said = event_json(event)
        if said is not None:
            for ear in ears:
                ear.hear(said)


class _Ear:
    """One listener's queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._said: deque[dict[str, Any]] = deque(maxlen=WAITING)
        self._news = asyncio.Event()
        self.silent = False

    def hear(self, said: dict[str, Any]) -> None:
        """Called on any thread."""
        self._said.append(said)
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            self._said.clear()  # the loop has closed

    async def take(self) -> list[dict[str, Any]]:
        """What was said, [] after a while of silence."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                await self._news.wait()
            self.silent = False
        except TimeoutError:
            self.silent = True
        self._news.clear()
        found = []
        while self._said:
            found.append(self._said.popleft())
        return found


def event_json(event: Event) -> dict[str, Any] | None:
    """An event for listeners, None for what is none of their business."""
    match event:
        case RoutingFrame():
            return {
                "event": "routing",
                "freq": event.freq.tolist(),
                "reap_sum": event.reap_sum.tolist(),
                "samples": event.samples,
                "tokens": event.tokens,
            }
        case JobEnded():
            return {"event": "ended", "job": event.job} | report_json(event)
        case Token() | Progress() | Notice() | JobStarted():
            named = NAMES[type(event)]
            return {"event": named} | dict(plain(event))
        case _:
            return None


NAMES: dict[type[Event], str] = {
    Token: "token",
    Progress: "progress",
    Notice: "notice",
    JobStarted: "started",
}
