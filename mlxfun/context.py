"""The callbacks of a long operation: report progress, emit events, check for cancellation.

The engine never prints. Library callers pass nothing and get the silent default; the worker
passes a context tied to its job.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mlxfun.events import Event
from mlxfun.tally import Tally


class Context:
    """Silent, never cancelled. The worker's subclass overrides every method."""

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        """Report that `done` of `total` units (unknown when None) of `label` are finished."""

    def emit(self, event: Event) -> None:
        """Hand an immutable event to whoever listens."""

    def check(self) -> None:
        """Raise `Cancelled` if the job was cancelled. Call between layers, batches and tokens."""

    def reading(self) -> Tally:
        """A tally for a data set that is about to be read; the job's report will show it."""
        return Tally()

    def interlude(self) -> None:
        """Between tokens: let waiting jobs that may run in the middle (steering) take their turn."""


class Quietly(Context):
    """Checks for a cancel as another context does, and shows nothing: for measurements inside a
    longer step."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def check(self) -> None:
        """See Context."""
        self._ctx.check()


class Again(Context):
    """As another context, for reading what its job has read and counted before."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        """See Context."""
        self._ctx.progress(label, done, total, unit)

    def emit(self, event: Event) -> None:
        """See Context."""
        self._ctx.emit(event)

    def check(self) -> None:
        """See Context."""
        self._ctx.check()

    def interlude(self) -> None:
        """See Context."""
        self._ctx.interlude()


SILENT = Context()
_RUNNING: ContextVar[Context] = ContextVar("running", default=SILENT)


def running() -> Context:
    """The context of the job that runs on this thread, for code that others' code calls back."""
    return _RUNNING.get()


@contextmanager
def as_running(ctx: Context) -> Iterator[None]:
    """Make `ctx` the running one inside the block."""
    token = _RUNNING.set(ctx)
    try:
        yield
    finally:
        _RUNNING.reset(token)
