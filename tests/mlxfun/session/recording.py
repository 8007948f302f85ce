"""A context that keeps what it is told, and can cancel."""

from __future__ import annotations

from mlxfun.context import Context
from mlxfun.errors import Cancelled


class Recorder(Context):
    def __init__(self, stop_after: int | None = None) -> None:
        self.events, self.left = [], stop_after

    def emit(self, event) -> None:
        self.events.append(event)

    def check(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Cancelled("cancelled")
            self.left -= 1
