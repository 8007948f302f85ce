"""Reports of scans and of the profile of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mlxfun.calibration.reports import WhyReport
from mlxfun.data.options import ScanKind
from mlxfun.report import Report
from mlxfun.text import counted


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
    technique: ScanKind
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
class TopToken:
    """A token's text, how often the expert served it, and how often it occurred."""

    text: str
    served: int
    of: int


@dataclass(frozen=True, slots=True)
class DossierReport(Report):
    """One expert at close quarters. why: its figures.

    served of tokens: how many of the tokens looked at it served, with mean_weight; top_tokens: those
    that are its own, by share. partner: the expert of its layer most like it, alike: how much, with
    1 for the same; note: why there is none. topic: a word or two about the tokens it serves more
    than others, "" where nothing is significant; topic_evidence, topic_q: what says so.
    """

    kind: ClassVar[str] = "dossier"
    why: WhyReport
    dataset: str
    tokens: int
    served: int
    mean_weight: float
    top_tokens: tuple[TopToken, ...]
    partner: int | None
    alike: float
    note: str = ""
    topic: str = ""
    topic_evidence: str = ""
    topic_q: float = 1.0

    def summary(self) -> str:
        near = (
            f"; most like it is E{self.partner} ({self.alike:.2f})"
            if self.partner is not None
            else ""
        )
        return (
            f"L{self.why.layer}:E{self.why.expert} {self.why.status}, served {self.served} of "
            f"{self.tokens:,} tokens{near}"
        )


TopicSource = Literal["domain scan", "safety scan", "profile"]
"""What found a topic."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A topic of an expert in words, "" for none that is significant, and what says so."""

    words: str = ""
    evidence: str = ""
    q: float = 1.0


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing that an expert of a decoder layer serves. evidence: a sentence; q: how sure, as the
    bound on the share of false findings. state: of the weights that it was found on."""

    layer: int
    expert: int
    words: str
    source: TopicSource
    evidence: str
    q: float
    state: str
    strength: float = 0.0


@dataclass(frozen=True, slots=True)
class TopicsReport(Report):
    """Topics in hand. looked: how many experts were profiled for it, 0 for none now. stale: how
    many of the rows were found on other weights than the present ones."""

    kind: ClassVar[str] = "topics"
    rows: tuple[Topic, ...]
    experts: int
    looked: int = 0
    dataset: str = ""
    stale: int = 0

    def summary(self) -> str:
        named = len({(row.layer, row.expert) for row in self.rows})
        text = f"{named:,} of {self.experts:,} experts have a topic"
        if self.looked:
            text += f"; {self.looked:,} profiled on {self.dataset}"
        return text + (f"; {self.stale} from other weights" if self.stale else "")
