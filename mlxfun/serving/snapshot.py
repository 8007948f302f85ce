"""What a server is doing, as one picture for whoever looks: requests, clients, what went wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mlxfun.events import Side
from mlxfun.report import Report
from mlxfun.serving.ask import Figures
from mlxfun.text import counted

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Doing = Literal["open", "paused", "draining", "stopped"]
"""open: requests are answered. paused: new ones wait, those in flight go on. draining: new ones are
refused, those in flight and those that wait are answered. stopped: nobody can connect."""

CLIENTS = 64
"""Clients that are told apart; those after them are counted together."""

PROBLEMS = 20
"""What went wrong last, so many are remembered."""

OTHERS = "others"


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A request. prompt, cached, generated: tokens; rate: tokens a second since the first of the
    answer; seconds: since it came. id: negative for the shell's own chat."""

    id: int
    client: str
    side: Side
    steered: bool
    waiting: bool
    prompt: int
    cached: int
    generated: int
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ClientLine:
    """What one client has had so far: requests, those that failed or were refused, and tokens."""

    name: str
    requests: int = 0
    failed: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """A request that failed or was refused. at: seconds since 1970."""

    client: str
    status: int
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class ServingReport(Report):
    """A server at one moment. rate: tokens a second of all requests together. lit: of each request
    that was answered a moment ago, the experts of one token, int32 [L, K], -1 where unused."""

    kind: ClassVar[str] = "serving"
    address: str
    doing: Doing
    requests: tuple[RequestLine, ...] = ()
    clients: tuple[ClientLine, ...] = ()
    problems: tuple[Problem, ...] = ()
    figures: Figures = field(default_factory=Figures)
    rate: float = 0.0
    lit: Mapping[int, Array] = field(default_factory=dict)

    @property
    def cached_share(self) -> float:
        """The share of all prompts' tokens that came from the cache, 0 before the first."""
        f = self.figures
        return f.cached_tokens / f.prompt_tokens if f.prompt_tokens else 0.0

    def data(self) -> dict[str, Any]:
        """The fields without `lit`."""
        found = Report.data(replace(self, lit={}))
        del found["lit"]
        return found

    def summary(self) -> str:
        f = self.figures
        now = f"{counted(f.in_flight, 'request', 'requests')} in flight, {f.waiting} waiting"
        speed = f", {self.rate:.0f} tokens/s" if f.in_flight else ""
        return f"{self.doing}: http://{self.address}/v1, {now}{speed}"


class Ledger:
    """Totals of each client, and what went wrong last. Lives on the model's thread, except that
    `refused` may be called from any."""

    def __init__(self) -> None:
        self._clients: dict[str, ClientLine] = {}
        self._problems: deque[Problem] = deque(maxlen=PROBLEMS)

    def add(self, client: str, **more: int) -> None:
        """Add to the totals of a client: fields of ClientLine."""
        name = client if client in self._clients or len(self._clients) < CLIENTS else OTHERS
        line = self._clients.get(name) or ClientLine(name)
        grown = {field_: getattr(line, field_) + count for field_, count in more.items()}
        self._clients[name] = replace(line, **grown)

    def failed(self, client: str, status: int, message: str) -> None:
        """A request of a client failed."""
        self.add(client, failed=1)
        self.refused(client, status, message)

    def refused(self, client: str, status: int, message: str) -> None:
        """A request was refused before the model saw it. What failed at the model is refused once."""
        last = self._problems[-1] if self._problems else None
        if last is not None and (last.client, last.message) == (client, message):
            return
        self._problems.append(Problem(client, status, message, time()))

    @property
    def clients(self) -> tuple[ClientLine, ...]:
        """Those with the most tokens first."""
        lines = self._clients.values()
        return tuple(sorted(lines, key=lambda c: (-c.generated, -c.requests, c.name)))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The newest first."""
        return tuple(reversed(self._problems))
