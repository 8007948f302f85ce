"""Options and the report of tasks: plain data, nothing heavy imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlxfun.editing.reports import ShownSide
from mlxfun.report import Report
from mlxfun.text import counted


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness. names: of tasks or groups. include: a directory with task files
    of one's own. limit: documents of each task, None for all. shots: examples ahead of each question,
    None for what the task says. as_chat: questions go through the chat template. max_tokens: of an
    answer, None for what the task says. batch: questions that are decoded together. seed: of which
    examples are shown.
    """

    names: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None
    as_chat: bool = False
    max_tokens: int | None = None
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A metric of a task. error: its standard error, None where the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None
    documents: int


@dataclass(frozen=True, slots=True)
class TaskReport(Report):
    """What a state scored in tasks. version: of the harness."""

    kind: ClassVar[str] = "tasks"
    state: str
    side: ShownSide
    rows: tuple[TaskRow, ...]
    limit: int | None
    version: str
    seconds: float

    def summary(self) -> str:
        scores = ", ".join(f"{r.task} {r.metric} {r.value:.4g}" for r in self.rows[:3])
        more = f", and {len(self.rows) - 3} more" if len(self.rows) > 3 else ""
        some = (
            ""
            if self.limit is None
            else f" (at most {counted(self.limit, 'document', 'documents')})"
        )
        return f"tasks of the {self.side} model{some}: {scores}{more}"
