"""Running lines of a session file in the middle of the answer before them, as they were recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlxfun.context import Context
from mlxfun.events import Event, Token
from mlxfun.tally import Tally


@dataclass(frozen=True, slots=True)
class During:
    """A line that ran in the middle of an answer, once that had `tokens` tokens."""

    tokens: int
    line: str


class Interleaved(Context):
    """The context of an answer which runs lines between its tokens.

    inner: the answer's own. due: what is to run, in order; what has run is taken out of the list,
    so that the caller sees what the answer was too short for. run: runs a line.
    """

    def __init__(self, inner: Context, due: list[During], run: Callable[[str], object]) -> None:
        self._inner, self._due, self._run = inner, due, run
        self._tokens = 0

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        self._inner.progress(label, done, total, unit)

    def emit(self, event: Event) -> None:
        if isinstance(event, Token):
            self._tokens += 1
        self._inner.emit(event)

    def check(self) -> None:
        self._inner.check()

    def reading(self) -> Tally:
        return self._inner.reading()

    def interlude(self) -> None:
        while self._due and self._due[0].tokens <= self._tokens:
            self._run(self._due.pop(0).line)
        self._inner.interlude()
