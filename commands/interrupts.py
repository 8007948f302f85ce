"""Handling of SIGINT (Ctrl-C) and SIGTERM.

Neither raises in the middle of an import. CPython's import system takes the lock of all imports and
then begins the block that releases it: an exception between the two leaves the lock taken, and the
worker thread, which imports MLX meanwhile, waits for it for ever.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import time
from types import CodeType, FrameType

_IMPORTING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
_AGAIN = 0.02
"""Seconds after which a signal that fell into an import is given once more."""


_listener: CodeType | None = None
"""The function that called `listen`."""


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM; a KeyboardInterrupt, so that it is handled wherever Ctrl-C is."""


def listen() -> None:
    """Turn SIGINT into KeyboardInterrupt and SIGTERM into `Terminated`, on the main thread.

    Where whoever started the program has SIGINT ignored, it stays so.
    """
    global _listener  # noqa: PLW0603
    _listener = sys._getframe(1).f_code
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def as_python_does() -> None:
    """SIGINT as Python itself has it, for asyncio, which replaces that handler and no other."""
    if signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_terminal(descriptor: int = 0) -> None:
    """Have this process ended by SIGHUP once the terminal at `descriptor` is closed at its other end.

    The kernel does so itself, but only where the terminal controls the process. Elsewhere reading
    from a terminal that is gone ends at once, again and again, and a screen would keep a processor
    busy for ever. What was done is in the journal, as after any other kill.
    """
    if hasattr(select, "poll") and os.isatty(descriptor):
        _thread.start_new_thread(_wait_for_end, (descriptor,))


def _wait_for_end(descriptor: int) -> None:
    watch = select.poll()
    watch.register(descriptor, 0)  # closing is told without being asked for
    for _, event in watch.poll():
        if event & select.POLLHUP:
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGHUP)
            os._exit(128 + signal.SIGHUP)  # ignored, as below nohup


def ignore() -> None:
    """Ignore further signals while the program ends, which takes a bounded time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def exit_code(problem: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM: what shells report."""
    number = signal.SIGTERM if isinstance(problem, Terminated) else signal.SIGINT
    return 128 + number


def _raise(number: int, frame: FrameType | None) -> None:
    if _importing(frame):
        # Not threading.Thread, whose start takes locks that the interrupted code may hold.
        _thread.start_new_thread(_once_more, (number,))
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way, other than one that the whole program runs in."""
    while frame is not None and frame.f_code is not _listener:
        if frame.f_code.co_filename in _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _once_more(number: int) -> None:
    time.sleep(_AGAIN)
    _thread.interrupt_main(signal.Signals(number))
