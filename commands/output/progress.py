"""Progress as plain lines on stderr: no cursor movement, so logs and screen readers can follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from mlxfun.events import Progress
from mlxfun.text import one_line, readable_bytes

EVERY_SECONDS = 2.0


class ProgressLines:
    """Prints a line when a step begins, every two seconds, and when it ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._label: str | None = None
        self._shown = 0.0
        self._held: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Print `progress` if it begins or ends a step, or two seconds after the last line."""
        now = self._clock()
        first = progress.label != self._label
        if first:
            self.end()
            self._label = progress.label
        self._held = progress
        if first or progress.done == progress.total or now - self._shown >= EVERY_SECONDS:
            self._print(now)

    def end(self) -> None:
        """End the step: print its last progress if that has not been printed."""
        if self._held is not None:
            self._print(self._clock())
        self._label = None

    def _print(self, now: float) -> None:
        progress, self._held = self._held, None
        if progress is not None:
            self._stream.write(one_line(describe(progress)) + "\n")
            self._stream.flush()
            self._shown = now


def describe(progress: Progress) -> str:
    """One line: label, progress, rate and remaining time where they are known."""
    text = progress.label
    if progress.total is not None:
        done = _amount(progress.done, progress.unit if progress.unit == "B" else "")
        share = progress.done / progress.total if progress.total else 1.0
        text += f": {done} of {_amount(progress.total, progress.unit)} ({share:.0%})"
    elif progress.done:
        text += f": {_amount(progress.done, progress.unit)}"
    if progress.done and progress.rate > 0:
        text += f", {_amount(progress.rate, progress.unit)}/s"
    if progress.eta and progress.eta >= 1:
        text += f", {progress.eta:,.0f} s left"
    return text


def _amount(count: float, unit: str) -> str:
    if unit == "B":
        return readable_bytes(count)
    number = f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"
    return f"{number} {unit}" if unit else number
