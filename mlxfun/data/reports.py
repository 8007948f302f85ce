"""Reports on data sets: one that was fetched, one that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mlxfun.report import Report
from mlxfun.text import counted


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


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the samples of a data set: the shortest, the median, the mean, the 95th percentile, the
    longest, and all together."""

    least: int
    median: int
    mean: float
    p95: int
    most: int
    total: int


@dataclass(frozen=True, slots=True)
class DatasetReport(Report):
    """What would be read of a data set. forms: {how a record is written: samples}. unit: of the
    lengths, "tokens", or "characters" where no model is loaded. first: the first sample as the
    model sees it. max_tokens: where longer samples would be cut, None without a model.
    """

    kind: ClassVar[str] = "dataset"
    source: str
    samples: int
    forms: dict[str, int]
    unit: Literal["tokens", "characters"]
    lengths: Lengths | None
    first: str
    max_tokens: int | None

    def summary(self) -> str:
        forms = ", ".join(f"{count:,} as {form}" for form, count in self.forms.items())
        text = f"{self.source}: {counted(self.samples, 'sample', 'samples')} ({forms})"
        if self.lengths is None:
            return text
        return f"{text}, {self.lengths.total:,} {self.unit}, median {self.lengths.median:,}"
