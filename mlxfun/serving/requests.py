"""Requests on their way through the scheduler, and the counts that outlive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from mlxfun.events import Side
from mlxfun.serving.ask import Ask, Frame, SteerWish
from mlxfun.serving.lanes import Moved
from mlxfun.serving.snapshot import Ledger, RequestLine
from mlxfun.serving.text import AnswerText

Deliver = Callable[[Frame], None]
Wish = tuple[Side, SteerWish | None]


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way. wish: the lane in which it is being answered. local: it is the shell's
    own chat, which listens on the model's thread. moved: where it stood in a lane that was closed.
    client: who asks. came, first: when it and its first token came, in monotonic seconds."""

    id: int
    ask: Ask
    deliver: Deliver
    text: AnswerText | None = None
    wish: Wish | None = None
    generated: int = 0
    local: bool = False
    moved: Moved | None = None
    client: str = ""
    side: Side = "base"
    cached: int = 0
    came: float = field(default_factory=monotonic)
    first: float = 0.0

    def line(self, waiting: bool, now: float) -> RequestLine:
        """How it stands. now: monotonic seconds."""
        rate = (self.generated - 1) / (now - self.first) if self.generated > 1 else 0.0
        return RequestLine(
            id=self.id,
            client=self.client,
            side=self.side,
            steered=self.ask.steer is not None,
            waiting=waiting,
            prompt=len(self.ask.prompt),
            cached=self.cached,
            generated=self.generated,
            rate=rate,
            seconds=now - self.came,
        )


@dataclass(slots=True)
class Totals:
    """Counts since the server was started; they outlive a model."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    def ended(self, outcome: str) -> None:
        """Count an outcome."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class Intake(Protocol):
    """What takes requests; the scheduler is one."""

    def submit(self, request: Request) -> None:
        """Accept a request."""

    def cancel(self, number: int) -> None:
        """The client is gone."""


class Port(Protocol):
    """Where requests come from and frames go to."""

    def take(self, intake: Intake) -> None:
        """Hand over what has come in: requests, and clients that are gone."""

    def post(self, frames: list[tuple[Deliver, Frame]]) -> None:
        """Deliver frames, on the thread of those who asked."""
