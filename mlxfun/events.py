"""Events: besides reports, the only data that leaves the worker thread. Frozen, no MLX arrays.

Legend for shapes in the whole project: L MoE layers (in model order), E experts per layer as
numbered in the checkpoint, T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlxfun.arrays import Array

if TYPE_CHECKING:
    from mlxfun.report import Report

Side = Literal["base", "candidate"]
"""The two sides while a plan is staged: the committed weights, and those with the plan."""

NoticeLevel = Literal["info", "warning", "offer"]
"""How much a notice matters. An offer stands until it is taken or declined."""


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of everything a job can emit."""


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """How far a step of the running job is. `seconds` since the step began.

    A step is over when the job sends a Progress with another label, a Token, or its JobEnded: from
    then on its Progress is history and should not be shown any more.
    """

    job: int
    label: str
    done: int
    total: int | None
    unit: str
    seconds: float

    @property
    def rate(self) -> float:
        """Units per second so far, 0.0 while nothing is known."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate, None when unknown."""
        if self.total is None or self.done <= 0 or self.seconds <= 0:
            return None
        return (self.total - self.done) * self.seconds / self.done


@dataclass(frozen=True, slots=True)
class RoutingFrame(Event):
    """Live statistics while calibrating or chatting, already on the host.

    freq: int64 [L, E], times each expert was selected so far.
    reap_sum: float64 [L, E], sum of weight x output norm so far.
    """

    job: int
    freq: Array
    reap_sum: Array
    samples: int
    tokens: int


ON_DISK, HELD, READ = range(3)
"""Where an expert is: on disk only; in memory; there since a moment ago, read because it was wanted."""


@dataclass(frozen=True, slots=True)
class ResidencyFrame(Event):
    """Where the experts of a partly resident model are now. held: int8 [L, E], see ON_DISK."""

    job: int
    held: Array


@dataclass(frozen=True, slots=True)
class Token(Event):
    """One generated token; it ends the step that its job sent Progress of (reading the prompt).

    experts: int32 [L, K], the experts that served the forward which
    *consumed* this token (-1 where unused); weights: float32 [L, K]. Both are None for a token
    that no forward consumed (the last one), and for all of a dense model.
    """

    job: int
    side: Side
    index: int
    token_id: int
    text: str
    experts: Array | None = None
    weights: Array | None = None


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """A sentence worth showing although nothing failed. line: the command line that takes an offer;
    about: the model that it is of, as `load` takes it, "" for any."""

    level: NoticeLevel
    text: str
    line: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True)
class JobQueued(Event):
    """A job was accepted. line: the command as typed."""

    job: int
    line: str


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    """The worker took up the job."""

    job: int
    line: str


@dataclass(frozen=True, slots=True)
class JobEnded(Event):
    """The job is over: exactly one of `report` and `error` is set.

    state: the model's committed state after it ("" without a model). usage: the error is one of
    usage (exit code 2 in headless runs). cancelled: the error is a cancel.
    """

    job: int
    line: str
    report: Report | None
    error: str | None
    seconds: float
    state: str
    cancelled: bool = False
    usage: bool = False
