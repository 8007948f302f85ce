"""Runs command lines for clients, and tells each of them what came of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future

from commands.engine import Engine
from mlxfun.events import Event, JobEnded
from mlxfun.serving.http.errors import Bad

REMEMBERED = 256
"""Ends of other people's jobs that are remembered, since a job may end before its number is known."""


class Runner:
    """Waits for the end of jobs. engine: also what the shell's state is read from."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._ended: OrderedDict[int, JobEnded] = OrderedDict()
        self._awaited: dict[int, Future[JobEnded]] = {}
        engine.subscribe(self._hear)

    def _hear(self, event: Event) -> None:
        if not isinstance(event, JobEnded):
            return
        with self._lock:
            future = self._awaited.pop(event.job, None)
            if future is None:
                self._ended[event.job] = event
                while len(self._ended) > REMEMBERED:
                    self._ended.popitem(last=False)
        if future is not None:
            future.set_result(event)

    async def run(self, line: str) -> JobEnded:
        """Run a command line as if it had been typed; its end."""
        job = self.engine.run(line)
        with self._lock:
            ended = self._ended.pop(job, None)
            if ended is not None:
                return ended
            future = self._awaited[job] = Future()
        return await asyncio.wrap_future(future)

    async def must(self, line: str) -> JobEnded:
        """The same. Raises Bad with the sentence of a command that fails."""
        ended = await self.run(line)
        if ended.error is not None:
            raise Bad(ended.error, status=400 if ended.usage else 409)
        return ended
