"""Reports on staged plans, steps of the history and saved models."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from mlxfun.checkpoint.reports import SaveReport
from mlxfun.events import Side
from mlxfun.report import Report
from mlxfun.text import counted, readable_bytes

StepAction = Literal["apply", "discard", "flip", "compact", "undo", "redo", "goto"]
"""What brought the model where it stands."""

ShownSide = Literal["current", "candidate"]
"""What the two sides are called in reports."""

ShownSubject = Literal[ShownSide, "checkpoint"]
"""What the subject of a measurement is called in reports."""


@dataclass(frozen=True, slots=True)
class PlanReport(Report):
    """A staged plan. kept and pruned: {decoder layer: experts}.

    bytes_before/after: the model's parameters as they would be saved. mass_lost: per layer, the
    share of the summed metric that goes with the pruned experts (None without statistics).
    peak_bytes: the most memory in use, model included, while it was planned and staged. straight:
    it was written to disk instead of staged.
    """

    kind: ClassVar[str] = "plan"
    technique: str
    metric: str | None
    strategy: str
    experts_before: int
    experts_after: int
    kept: dict[int, tuple[int, ...]]
    pruned: dict[int, tuple[int, ...]]
    bytes_before: int
    bytes_after: int
    delta_bytes: int
    mass_lost: dict[int, float] | None
    state_after: str
    warnings: tuple[str, ...] = ()
    peak_bytes: int = 0
    straight: bool = False

    @property
    def deed(self) -> str:
        """What was done, as a summary begins: "staged prune"."""
        return f"{'wrote' if self.straight else 'staged'} {self.technique}"

    @property
    def left(self) -> str:
        """How many experts a layer keeps: "12", or "11 to 12" where layers differ, as they may when
        picked by hand or for a global budget."""
        each = [len(experts) for experts in self.kept.values()] or [self.experts_after]
        least, most = min(each), max(each)
        return str(most) if least == most else f"{least} to {most}"

    def summary(self) -> str:
        gone = counted(sum(map(len, self.pruned.values())), "expert pruned", "experts pruned")
        size = f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}"
        each = f"{self.experts_before} -> {self.left} per layer"
        return f"{self.deed}: {gone} ({each}), {size}"


Extended = TypeVar("Extended", bound=PlanReport)


def extended(kind: type[Extended], report: PlanReport, **details: Any) -> Extended:
    """A technique's own report: the common figures of `report` and the details of its kind."""
    common = {f.name: getattr(report, f.name) for f in fields(PlanReport)}
    return kind(**(common | details))


@dataclass(frozen=True, slots=True)
class WrittenReport(SaveReport):
    """An edit that was written straight to disk; the resident model is as before. plan: what was
    done, as of a staged plan."""

    kind: ClassVar[str] = "written"
    plan: PlanReport = field(kw_only=True)

    def summary(self) -> str:
        return (
            f"{self.plan.summary()}; {SaveReport.summary(self)}; the model in memory is as before"
        )


@dataclass(frozen=True, slots=True)
class StepReport(Report):
    """apply, discard, flip, compact, undo, redo, goto: where the model stands now.

    undo_reads, undo_seconds: bytes that undoing this step reads back from the checkpoint, and how
    long that takes about; 0 where all is kept in memory. bytes_freed: of a compact.
    """

    kind: ClassVar[str] = "step"
    action: StepAction
    node: int
    command: str
    state_before: str
    state_after: str
    live: Side
    bytes_held: int
    milliseconds: float
    bytes_freed: int = 0
    undo_reads: int = 0
    undo_seconds: float = 0.0

    def summary(self) -> str:
        text = (
            f"{self.action}: {self.command} (node {self.node}, state {self.state_after}, "
            f"{self.milliseconds:.1f} ms)"
        )
        return f"{text}; {self.undo_cost}" if self.undo_cost else text

    @property
    def undo_cost(self) -> str:
        """What undoing the step costs, "" for next to nothing."""
        if not self.undo_reads:
            return ""
        seconds = max(1, round(self.undo_seconds))
        size = readable_bytes(self.undo_reads)
        return f"undo will read {size} back from the checkpoint, about {seconds} s"


@dataclass(frozen=True, slots=True)
class HistoryNode:
    """One state of the model. bytes: tensors its edit made and holds; label: its given name;
    steering: what steers it, in a few words, "" for nothing."""

    id: int
    parent: int | None
    command: str
    state: str
    bytes: int
    scores: dict[str, float] = field(default_factory=dict)
    label: str = ""
    steering: str = ""


@dataclass(frozen=True, slots=True)
class HistoryReport(Report):
    """The tree of states; `current` is the node the model is at."""

    kind: ClassVar[str] = "history"
    nodes: tuple[HistoryNode, ...]
    current: int
    bytes_held: int
    budget: int | None

    def summary(self) -> str:
        limit = f" of {readable_bytes(self.budget)}" if self.budget is not None else ""
        return (
            f"{counted(len(self.nodes), 'node', 'nodes')}, at node {self.current}, "
            f"{readable_bytes(self.bytes_held)}{limit} held"
        )
