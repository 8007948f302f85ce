"""Reports on what a person does by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.reports import Report


@dataclass(frozen=True, slots=True)
class ProbeReport(Report):
    """A quick measurement of the staged plan `measured_state`; a preview is the thorough one.

    perplexity of the plan and of the checkpoint (baseline) on the same few tokens; kl_mean in nats.
    """

    kind: ClassVar[str] = "probe"
    measured_state: str
    dataset: str
    tokens: int
    perplexity: float
    baseline: float
    kl_mean: float
    top1_agreement: float

    @property
    def ratio(self) -> float:
        """Perplexity over the checkpoint's on the same tokens."""
        return self.perplexity / self.baseline

    def summary(self) -> str:
        return (
            f"probe: perplexity {self.perplexity:.2f} ({self.ratio:.3f}x the checkpoint), KL "
            f"{self.kl_mean:.4f}, same next token {self.top1_agreement:.1%}, on {self.tokens} tokens"
        )
