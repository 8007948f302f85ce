"""The queue that carries events from the worker's thread to the screen's thread.

The worker pushes every event here; the screen drains at its own pace. Events keep their order.
Heat frames and progress are worth only their newest value, so a newer one takes the place of one
that has not been drawn yet: a slow screen does not accumulate 94 x 512 arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from mlxfun.events import Event, JobStarted, Progress, ResidencyFrame, RoutingFrame, Token

_LATEST_WINS = (RoutingFrame, ResidencyFrame, Progress)
_NEXT_FRAME = (RoutingFrame, ResidencyFrame, Progress, Token)


class EventQueue:
    """A thread-safe buffer of events.

    wake: called, on the pushing thread, for events that should not wait for the next frame.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = Lock()
        self._pending: list[Event] = []
        self._slots: dict[type[Event], int] = {}

    def push(self, event: Event) -> None:
        """Add one event; does not block or raise, may be called from any thread."""
        kind = type(event)
        with self._lock:
            slot = self._slots.get(kind) if kind in _LATEST_WINS else None
            if slot is not None:
                self._pending[slot] = event
            else:
                if kind is JobStarted:
                    # The next job's frames must not slip in before its start.
                    self._slots.clear()
                elif kind in _LATEST_WINS:
                    self._slots[kind] = len(self._pending)
                self._pending.append(event)
        if kind not in _NEXT_FRAME:
            self._wake()

    def drain(self) -> list[Event]:
        """The events pushed since the last call, in order."""
        with self._lock:
            events, self._pending = self._pending, []
            self._slots.clear()
        return events
