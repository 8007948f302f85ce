"""The standard streams of the program: closed, full or broken ones, and what messages may hold.

Only the standard library is imported here, besides `mlxfun.text`: it comes before all else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from mlxfun.text import one_line, visible


class Messages:
    """A stream for messages: no control characters pass, and failing to write is no error.

    Where messages cannot be written there is no place to say so.
    """

    def __init__(self, stream: TextIO | Messages) -> None:
        self._stream: TextIO = stream._stream if isinstance(stream, Messages) else stream

    def write(self, text: str) -> int:
        """Write `text` as `visible` gives it."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if the stream can be flushed."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputLost(OSError):
    """Standard output cannot be written; the text is the system's reason."""


class Results:
    """Standard output for results. Raises OutputLost, or BrokenPipeError when the reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` as it is."""
        return int(self._do(lambda: self._stream.write(text)))

    def flush(self) -> None:
        """Flush the stream."""
        self._do(self._stream.flush)

    def _do(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BrokenPipeError:
            raise
        except OSError as problem:
            raise OutputLost(problem.strerror or str(problem)) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make the standard streams usable: a closed one has nothing to read and takes what is written.

    A closed descriptor is opened on the null device, or the next file that is opened would get its
    number and whatever is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # None: a test's stream
        reconfigure(errors="replace")
    sys.stderr = Messages(sys.stderr)


def _open_null(number: int) -> None:
    found = os.open(os.devnull, os.O_RDWR)
    if found != number:
        os.dup2(found, number)
        os.close(found)


def discard(stream: TextIO) -> None:
    """Lead the descriptor of `stream` to the null device, with all that is still to be flushed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()


def finish() -> str | None:
    """Flush the standard streams before the interpreter does; why stdout could not be, or None."""
    problem = None
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
        discard(sys.stdout)
    messages = sys.stderr
    try:
        (messages._stream if isinstance(messages, Messages) else messages).flush()
    except (OSError, ValueError):
        discard(messages)
    return problem


def say(sentence: str) -> None:
    """Print a sentence on stderr, as one line."""
    Messages(sys.stderr).write(one_line(sentence) + "\n")
    Messages(sys.stderr).flush()
