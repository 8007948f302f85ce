"""Two states of the history against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.reports import Report, Sample, counted


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One state as measured. bytes: as saved; experts: left in all layers; work: the share of the
    statistics' metric that its experts did (None without statistics); the rest against the
    checkpoint, as in EvaluateReport."""

    node: int
    name: str
    state: str
    bytes: int
    experts: int
    work: float | None
    perplexity: float
    ratio: float
    kl_mean: float | None
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class CompareReport(Report):
    """Two states on the same tokens. only_a, only_b: {decoder layer: experts the other lacks}.

    steering_off: the steering in force was left out.
    """

    kind: ClassVar[str] = "compare"
    a: NodeFigures
    b: NodeFigures
    tokens: int
    datasets: tuple[str, ...]
    only_a: dict[int, tuple[int, ...]]
    only_b: dict[int, tuple[int, ...]]
    steering_off: bool = False

    def summary(self) -> str:
        a, b = self.a, self.b
        apart = sum(map(len, (*self.only_a.values(), *self.only_b.values())))
        off = "; steering was off for both" if self.steering_off else ""
        return (
            f"node {a.node} against {b.node}: perplexity {a.perplexity:.3f} and "
            f"{b.perplexity:.3f} ({b.perplexity / a.perplexity:.3f}x node {a.node}'s) "
            f"on {counted(self.tokens, 'token', 'tokens')}, {counted(apart, 'expert differs', 'experts differ')}{off}"
        )
