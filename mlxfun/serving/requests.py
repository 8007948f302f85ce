"""Requests on their way through the scheduler, and the counts that outlive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mlxfun.events import Side
from mlxfun.serving.ask import Ask, Frame, SteerWish
from mlxfun.serving.lanes import Moved
from mlxfun.serving.text import AnswerText

Deliver = Callable[[Frame], None]
Wish = tuple[Side, SteerWish | None]


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way. wish: the lane in which it is being answered. local: it is the shell's
    own chat, which listens on the model's thread. moved: where it stood in a lane that was closed."""

    id: int
    ask: Ask
    deliver: Deliver
    text: AnswerText | None = None
    wish: Wish | None = None
    generated: int = 0
    local: bool = False
    moved: Moved | None = None


@dataclass(slots=True)
class Totals:
    """Counts since the server was started; they outlive a model."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

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
