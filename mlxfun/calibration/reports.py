"""Reports on calibration and on files of routing statistics."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mlxfun.arrays import Array
from mlxfun.calibration.options import Combined, Metric
from mlxfun.report import Report
from mlxfun.text import counted

StatsAction = Literal["show", "save", "load", "count on", "count off", "reset"]
"""What was done to the statistics that are reported."""

ExpertStatus = Literal["kept", "pruned", "to be pruned", "forced on", "forced off"]
"""What becomes of an expert."""


@dataclass(frozen=True, slots=True)
class CombineReport(Report):
    """Statistics made from files. combined: how ("sum", "rank"), "" for a subtraction."""

    kind: ClassVar[str] = "stats-combine"
    action: Literal["merge", "subtract"]
    files: tuple[str, ...]
    path: str
    combined: Combined
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
class PurgeReport(Report):
    """Statistics without the experts that few tokens were routed to.

    experts: of all layers together. by_freq, by_count: below either limit; purged: below one or
    both; kept: the others. above_norm: with a mean output norm above the limit, which are kept.
    """

    kind: ClassVar[str] = "stats-purge"
    files: tuple[str, ...]
    path: str
    experts: int
    by_freq: int
    by_count: int
    purged: int
    kept: int
    above_norm: int
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        return (
            f"stats purge: {self.purged:,} of {self.experts:,} experts taken out ({self.by_freq:,} "
            f"by --min-freq, {self.by_count:,} by --min-count), {self.kept:,} kept, "
            f"{self.above_norm:,} above --max-norm; wrote {self.path}"
        )


@dataclass(frozen=True, slots=True)
class Extreme:
    """One expert at an end of a difference. position: of its layer, among the MoE layers."""

    layer: int
    position: int
    expert: int
    difference: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the scores by one metric in a first file minus those in a second, over all experts.

    higher: where the first has more, largest first; lower: where the second has.
    """

    metric: Metric
    mean: float
    std: float
    min: float
    max: float
    positive: int
    negative: int
    zero: int
    higher: tuple[Extreme, ...]
    lower: tuple[Extreme, ...]


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
    rank_correlation: dict[Metric, float]
    overlap: dict[Metric, float]
    rows: tuple[DiffRow, ...]
    notices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    share: dict[Metric, Array] = field(default_factory=dict)
    figures: Figures | None = None

    def data(self) -> dict[str, Any]:
        """The fields without the maps."""
        found = Report.data(replace(self, share={}))
        del found["share"]
        return found

    def summary(self) -> str:
        where = f"; wrote {self.path}" if self.path else ""
        asked = "reap_sum" if self.figures is None else self.figures.metric
        metric: Metric = asked if asked in self.rank_correlation else "reap_sum"
        return (
            f"stats diff: rank correlation {self.rank_correlation[metric]:.3f}, "
            f"{self.overlap[metric]:.0%} of the lowest quarter in common ({metric}){where}"
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
    metric: Metric
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
class CollectReport(Report):
    """A calibration run. coverage: share of (layer, expert) pairs seen; unseen lists the rest.

    steering_off: the steering in force was left out.
    """

    kind: ClassVar[str] = "collect"
    dataset: str
    samples: int
    samples_planned: int
    tokens: int
    tokens_per_second: float
    coverage: float
    unseen: tuple[tuple[int, int], ...]
    suggested_samples: int | None
    held_out: int
    cancelled: bool
    steering_off: bool = False

    def summary(self) -> str:
        # Statistics that were read from a file were measured at no speed.
        rate = f" at {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        text = (
            f"{counted(self.samples, 'sample', 'samples')}, "
            f"{counted(self.tokens, 'token', 'tokens')}{rate}; {self.coverage:.1%} of the experts seen"
        )
        if self.cancelled:
            text = f"cancelled after {self.samples} of {self.samples_planned} samples: {text}"
        if self.unseen and self.suggested_samples:
            text += f"; {len(self.unseen):,} never seen, try {self.suggested_samples:,} samples"
        if self.steering_off:
            text += "; steering was off while calibrating (chat counts with it: `stats count on`)"
        return text


@dataclass(frozen=True, slots=True)
class StatsReport(Report):
    """The statistics in hand, merged from `sources` runs. steered: some were counted in chat while
    steering was in force. earlier: the file names its model by the identity that an earlier version
    gave it. unnamed: it does not say on which model it was made, as those of other tools do not."""

    kind: ClassVar[str] = "stats"
    action: StatsAction
    layers: tuple[int, ...]
    experts: int
    samples: int
    tokens: int
    coverage: float
    counting: bool
    state: str
    stale: bool
    path: str | None
    least: tuple[tuple[int, int, float], ...]  # (layer, expert, reap_sum), lowest first
    most: tuple[tuple[int, int, float], ...]
    combined: Combined = ""
    sources: int = 1
    steered: bool = False
    earlier: bool = False
    unnamed: bool = False

    def summary(self) -> str:
        where = f" ({self.path})" if self.path else ""
        if self.combined:
            where += f", merged by {self.combined} from {self.sources} runs"
        stale = "; taken on another state of the weights" if self.stale else ""
        stale += "; some of it from steered chat" if self.steered else ""
        stale += "; made with the identity of an earlier version" if self.earlier else ""
        stale += "; the file does not say on which model it was made" if self.unnamed else ""
        return (
            f"stats {self.action}{where}: {counted(self.samples, 'sample', 'samples')}, "
            f"{counted(self.tokens, 'token', 'tokens')}, coverage {self.coverage:.1%}, counting chat {'on' if self.counting else 'off'}{stale}"
        )


@dataclass(frozen=True, slots=True)
class WhyReport(Report):
    """The numbers behind one expert. ranks: 1 is the highest of its layer."""

    kind: ClassVar[str] = "why"
    layer: int
    expert: int
    status: ExpertStatus
    scores: dict[Metric, float]
    ranks: dict[Metric, int]
    of: int
    verdict: str

    def summary(self) -> str:
        return f"L{self.layer}:E{self.expert} {self.status}: {self.verdict}"
