"""Reports on distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxfun.editing.reports import PlanReport


@dataclass(frozen=True, slots=True)
class Measured:
    """A state on a text. kl: mean KL(checkpoint || state) in nats a token."""

    kl: float
    perplexity: float


NOTHING = Measured(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Judged:
    """A text before and after. perplexity: the checkpoint's."""

    samples: int
    before: Measured
    after: Measured
    perplexity: float

    @property
    def gain(self) -> float:
        """The share of the KL that is gone."""
        return 1 - self.after.kl / self.before.kl if self.before.kl > 0 else 0.0


NO_TEXT = Judged(0, NOTHING, NOTHING, 1.0)


@dataclass(frozen=True, slots=True)
class DistilReport(PlanReport):
    """A staged distillation. held_out: text that training did not see; fitted: as many samples that
    it saw. steps: that were taken, of `planned`; best: after which what is staged was there. errors:
    with `local`, {decoder layer: squared error of its output relative to its square, before and
    after, on tokens left out of the fit}.
    """

    train: str = "router"
    held_out: Judged = NO_TEXT
    fitted: Judged = NO_TEXT
    steps: int = 0
    planned: int = 0
    best: int = 0
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)

    def summary(self) -> str:
        text = self.held_out
        figures = (
            f"held-out KL {text.before.kl:.4f} -> {text.after.kl:.4f} nats, perplexity "
            f"{text.before.perplexity:.2f} -> {text.after.perplexity:.2f} "
            f"({text.perplexity:.2f} in the checkpoint)"
        )
        how = f"step {self.best} of {self.steps}" if self.steps else "layer by layer"
        return f"{self.deed} of {self.train}s: {figures}, {how}".replace(
            "moes", "router and experts"
        )
