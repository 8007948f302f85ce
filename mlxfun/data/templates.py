"""Bounds on a chat template while it runs: time, and the length of what it makes.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and processes,
not from loops without end or from text that doubles until memory is full. The lines of the
template, and nothing else, are watched while it runs; a template that is within its bounds gives
what it gave.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlxfun.errors import DatasetError

SECONDS = 10.0
"""How long a template may take for one conversation; usual ones take a millisecond."""

CHARACTERS = 64 << 20
"""How long its text may become, and any text that it keeps in a variable."""

_SOURCE = "<template>"  # what Jinja calls the code of a template that is no file
_EVERY = 64

Trace = Callable[[FrameType, str, Any], Any]


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Run a chat template inside the block. where: the conversation, for the error.

    Raises DatasetError where it takes longer than SECONDS or makes more than CHARACTERS.
    """
    watch = _Watch(where)
    before = sys.gettrace()
    sys.settrace(watch.enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Watch:
    """Follows the lines of a template in this thread."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.deadline = time.monotonic() + SECONDS
        self.lines = 0
        self.made = 0

    def enter(self, frame: FrameType, event: str, argument: Any) -> Trace | None:
        """A function is called: its lines are followed if it is of the template."""
        return self.line if frame.f_code.co_filename == _SOURCE else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Trace:
        """A line is about to run, or a piece of text was made (a return of a generator)."""
        self.lines += 1
        if self.lines % _EVERY == 0 and time.monotonic() > self.deadline:
            raise self.refused(f"runs for more than {SECONDS:g} seconds")
        if event == "return" and isinstance(argument, str):
            self.made += len(argument)
        kept = max((len(v) for v in frame.f_locals.values() if isinstance(v, str)), default=0)
        if max(self.made, kept) > CHARACTERS:
            raise self.refused(f"makes more than {CHARACTERS:,} characters")
        return self.line

    def refused(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.where}: the model's chat template {what}; use a model with another template, "
            "or a data set without conversations"
        )
