"""Reports on what a person does by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.reports import Report, WhyReport


@dataclass(frozen=True, slots=True)
class ProbeReport(Report):
    """A quick measurement of the staged plan `measured_state`; a preview is the thorough one.

    perplexity of the plan and of the checkpoint (baseline) on the same few tokens; kl_mean in nats.
    steered: steering was in force on the plan, as it never is on the checkpoint.
    """

    kind: ClassVar[str] = "probe"
    measured_state: str
    dataset: str
    tokens: int
    perplexity: float
    baseline: float
    kl_mean: float
    top1_agreement: float
    steered: bool = False

    @property
    def ratio(self) -> float:
        """Perplexity over the checkpoint's on the same tokens."""
        return self.perplexity / self.baseline

    def summary(self) -> str:
        how = "probe, while steering" if self.steered else "probe"
        return (
            f"{how}: perplexity {self.perplexity:.2f} ({self.ratio:.3f}x the checkpoint), KL "
            f"{self.kl_mean:.4f}, same next token {self.top1_agreement:.1%}, on {self.tokens} tokens"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What one side said. side: "base" or "candidate"; label: what that is; tokens: its pieces."""

    side: str
    label: str
    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class ABReport(Report):
    """The same prompt and seed answered by two sides.

    first_divergence: index of the first token that differs, None when none does. kl: nats at each
    token of the base's answer, KL(base || candidate) given the same text before it.
    """

    kind: ClassVar[str] = "ab"
    prompt: str
    base: Answer
    candidate: Answer
    first_divergence: int | None
    kl: tuple[float, ...]
    seed: int

    @property
    def kl_mean(self) -> float:
        """Mean over the tokens, 0.0 for an empty answer."""
        return sum(self.kl) / len(self.kl) if self.kl else 0.0

    def data(self) -> dict[str, Any]:
        """The fields and `kl_mean`."""
        return {**Report.data(self), "kl_mean": self.kl_mean}

    def summary(self) -> str:
        kl = f"mean KL {self.kl_mean:.4f} a token"
        where = self.first_divergence
        if where is None:
            return f"{self.base.label} and {self.candidate.label} answer the same; {kl}"
        return (
            f"{self.base.label} and {self.candidate.label} part at token {where + 1} of "
            f"{len(self.base.tokens)} and {len(self.candidate.tokens)}; {kl}"
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
    1 for the same; note: why there is none.
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
