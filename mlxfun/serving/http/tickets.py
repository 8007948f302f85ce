"""A request on the event loop: its frames as they come, several at once when the model is faster."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from mlxfun.serving.ask import Admitted, Ask, Ended, Failed, Frame
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.service import Refused, Service


class Ticket:
    """`with Ticket(service, ask) as ticket:` asks, and lets the model's thread know when the block
    is left before the answer was complete."""

    def __init__(self, service: Service, ask: Ask, client: str = "") -> None:
        self._service, self._ask, self._client = service, ask, client
        self._frames: deque[Frame] = deque()
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._number: int | None = None
        self._kept = False
        self.over = False
        self.gone = False
        self.admitted: Admitted | None = None

    def __enter__(self) -> Self:
        try:
            self._number = self._service.submit(self._ask, self._deliver, self._client)
        except Refused as problem:
            raise Bad(str(problem), status=problem.status) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if not self._kept or kind is not None:
            self.abandon()

    def kept(self) -> Self:
        """Leaving the block shall not end the request: somebody else sees to it from here on."""
        self._kept = True
        return self

    def abandon(self) -> None:
        """The client is gone: its slot shall be free."""
        if not self.over and self._number is not None:
            self.over = self.gone = True
            self._service.cancel(self._number)
            self._news.set()
            self._begun.set()

    def _deliver(self, frame: Frame) -> None:
        """Called on the event loop."""
        if self.gone:
            return
        if isinstance(frame, Admitted):
            self.admitted = frame
            self._begun.set()
        if isinstance(frame, Ended | Failed):
            self.over = True
            self._begun.set()
        self._frames.append(frame)
        self._news.set()

    async def begun(self, seconds: float) -> None:
        """Wait until the request is admitted, or so long. Raises Bad if it is not admitted, Gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._begun.wait()
        if self.gone:
            raise Gone
        first = self._frames[0] if self._frames else None
        if isinstance(first, Failed):
            raise Bad(first.message, status=first.status)

    async def frames(self, seconds: float = math.inf) -> AsyncIterator[list[Frame]]:
        """All frames that have come, in order, until the last one; [] when none came for `seconds`.

        Ends early if the client is gone.
        """
        while True:
            if not self._frames:
                if self.over:
                    return
                self._news.clear()
                try:
                    async with asyncio.timeout(None if seconds == math.inf else seconds):
                        await self._news.wait()
                except TimeoutError:
                    yield []
                    continue
            if self.gone:
                return
            found = list(self._frames)
            self._frames.clear()
            yield found


class Gone(Exception):
    """The client went away before its answer was complete."""
