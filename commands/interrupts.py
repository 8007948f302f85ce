"""Handling of SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM; a KeyboardInterrupt, so that it is handled wherever Ctrl-C is."""


def listen() -> None:
    """Turn SIGTERM into `Terminated` on the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


def ignore() -> None:
    """Ignore further signals while the program ends, which takes a bounded time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def exit_code(problem: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM: what shells report."""
    number = signal.SIGTERM if isinstance(problem, Terminated) else signal.SIGINT
    return 128 + number


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
