"""The report on a fetched data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.report import Report


@dataclass(frozen=True, slots=True)
class PrepareReport(Report):
    """A data set written as JSONL. seen: records looked at; written: lines kept."""

    kind: ClassVar[str] = "prepare-dataset"
    source: str
    split: str
    path: str
    seen: int
    written: int

    def summary(self) -> str:
        return f"wrote {self.written} of {self.seen} records of {self.source} to {self.path}"
