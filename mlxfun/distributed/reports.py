"""The report on workers."""

from __future__ import annotations

from dataclasses import dataclass

from mlxfun.report import Report


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker. host: its machine; device: what it computes on; batches: run since the start."""

    rank: int
    host: str
    device: str
    batches: int


@dataclass(frozen=True, slots=True)
class WorkersReport(Report):
    """The workers of a session, none where passes run here. state: of the weights they hold."""

    workers: tuple[WorkerRow, ...]
    backend: str = ""
    state: str = ""

    def summary(self) -> str:
        """One sentence."""
        if not self.workers:
            return "no workers: passes run in this process"
        hosts = len({row.host for row in self.workers})
        on = "one machine" if hosts == 1 else f"{hosts} machines"
        return f"{len(self.workers)} workers on {on}, joined by {self.backend}"
