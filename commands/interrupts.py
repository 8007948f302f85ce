"""Handling of SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: wherever Ctrl-C is handled, this is too, unless told apart."""


def listen() -> None:
    """Turn SIGTERM into `Terminated` on the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


def ignore() -> None:
    """Take no further notice: we are leaving already, and that takes a bounded time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def exit_code(problem: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM: what shells report."""
    number = signal.SIGTERM if isinstance(problem, Terminated) else signal.SIGINT
    return 128 + number


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
