"""Reports on data: sets told apart or prepared, files of statistics compared and combined."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mlxfun.reports import Report, counted

if TYPE_CHECKING:
    from mlxfun.events import Array


@dataclass(frozen=True, slots=True)
class ScanRow:
    """One flagged expert. Differences are first set minus second; see mlxfun.contrast."""

    layer: int
    expert: int
    composite: float
    differential_freq: float
    differential_activation: float
    q: float
    stability: float
    risk_difference: float | None


@dataclass(frozen=True, slots=True)
class ScanReport(Report):
    """Two sets told apart by their experts, as written to `path`.

    first, second: the data sets; samples and tokens of each. more, less: {decoder layer: experts}
    that work more on the first, on the second. by_percentile: how many the percentile rule alone
    would name. rows: the flagged experts, strongest first.
    """

    kind: ClassVar[str] = "scan"
    technique: str  # "safety" or "domain"
    name: str
    path: str
    state: str
    first: str
    second: str
    samples: tuple[int, int]
    tokens: tuple[int, int]
    experts: int
    threshold_percentile: float
    alpha: float
    more: dict[int, tuple[int, ...]]
    less: dict[int, tuple[int, ...]]
    by_percentile: int
    rows: tuple[ScanRow, ...]
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        more, less = (sum(len(v) for v in sets.values()) for sets in (self.more, self.less))
        one, two = ("harmful", "benign") if self.technique == "safety" else (self.name, "general")
        return (
            f"{self.technique} scan: {counted(more, 'expert works', 'experts work')} more on {one}, "
            f"{less} more on {two} text, of {self.experts} (q <= {self.alpha:g}); wrote {self.path}"
        )


@dataclass(frozen=True, slots=True)
class CombineReport(Report):
    """Statistics made from files. combined: how ("sum", "rank"), "" for a purge."""

    kind: ClassVar[str] = "stats-combine"
    action: str  # "merge" or "purge"
    files: tuple[str, ...]
    path: str
    combined: str
    sources: int
    layers: tuple[int, ...]
    experts: int
    samples: int
    tokens: int
    model: str
    state: str
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        how = f" by {self.combined}" if self.action == "merge" else ""
        return (
            f"stats {self.action}{how}: {counted(self.samples, 'sample', 'samples')}, "
            f"{counted(self.tokens, 'token', 'tokens')} from {len(self.files)} files; wrote {self.path}"
        )


@dataclass(frozen=True, slots=True)
class DiffRow:
    """One expert. share_a, share_b: of its layer's reap_sum, in the first and the second file."""

    layer: int
    expert: int
    share_a: float
    share_b: float


@dataclass(frozen=True, slots=True)
class DiffReport(Report):
    """Two files of statistics compared. rank_correlation and overlap: see mlxfun.combine.

    rows: the experts whose share differs most, largest difference first. share: per metric,
    float64 [L, E], the share in the first file minus that in the second; for a map, and left out
    of `data`, since --output writes it.
    """

    kind: ClassVar[str] = "stats-diff"
    files: tuple[str, str]
    path: str | None
    samples: tuple[int, int]
    tokens: tuple[int, int]
    rank_correlation: dict[str, float]
    overlap: dict[str, float]
    rows: tuple[DiffRow, ...]
    notices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    share: dict[str, Array] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The fields without the maps."""
        found = Report.data(replace(self, share={}))
        del found["share"]
        return found

    def summary(self) -> str:
        where = f"; wrote {self.path}" if self.path else ""
        return (
            f"stats diff: rank correlation {self.rank_correlation['reap_sum']:.3f}, "
            f"{self.overlap['reap_sum']:.0%} of the lowest quarter in common (reap_sum){where}"
        )


@dataclass(frozen=True, slots=True)
class RankRow:
    """One expert: its rank in each file, 1 the busiest of its layer, and their sum."""

    layer: int
    expert: int
    ranks: tuple[int, ...]
    total: int


@dataclass(frozen=True, slots=True)
class RankReport(Report):
    """Experts ranked by several files of statistics. chosen: {decoder layer: experts that go}.

    rows: the largest sums of ranks. path: the expert list that was written; staged: what goes was
    staged.
    """

    kind: ClassVar[str] = "stats-rank"
    files: tuple[str, ...]
    metric: str
    path: str | None
    layers: tuple[int, ...]
    experts: int
    chosen: dict[int, tuple[int, ...]]
    rows: tuple[RankRow, ...]
    notices: tuple[str, ...] = ()
    staged: bool = False

    def summary(self) -> str:
        gone = sum(map(len, self.chosen.values()))
        of = len(self.layers) * self.experts
        text = f"{gone} of {of} experts rank low in all {len(self.files)} files by {self.metric}"
        text += "; staged" if self.staged else ""
        return text + (f"; wrote {self.path}" if self.path else "")


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
