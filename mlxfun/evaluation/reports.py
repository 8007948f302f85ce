"""Reports of measurements: perplexity and KL, probes, states compared, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mlxfun.editing.reports import ShownSide, ShownSubject
from mlxfun.evaluation.answer_health import AnswerHealth
from mlxfun.report import Report
from mlxfun.text import counted

RefusalRule = Literal["phrases"]
"""See mlxfun.evaluation.refusal_rule."""


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """Refused answers of the harmful and of the harmless prompts, by the rule of
    mlxfun.evaluation.refusal_rule. evasive: answers to harmful prompts that are no refusals and evade.
    """

    harmful: int
    of_harmful: int
    harmless: int
    of_harmless: int
    evasive: int = 0

    def __str__(self) -> str:
        evasive = f" ({self.evasive} more evasive)" if self.evasive else ""
        return (
            f"{self.harmful} of {self.of_harmful} harmful{evasive}, "
            f"{self.harmless} of {self.of_harmless} harmless"
        )


@dataclass(frozen=True, slots=True)
class RefusalReport(Report):
    """Refusals of `subject` beside what it is compared with.

    before: of the reference (the checkpoint, or for a staged plan the current weights).
    first_token_kl, answer_kl: KL(reference || subject) in nats on the harmless prompts, where the
    answer begins and on average over the reference's answers. examples: (prompt, before, after).
    """

    kind: ClassVar[str] = "refusals"
    subject: ShownSide
    reference: ShownSubject
    rule: RefusalRule
    before: RefusalCount
    after: RefusalCount
    first_token_kl: float
    answer_kl: float
    examples: tuple[tuple[str, str, str], ...] = ()
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        return (
            f"{self.subject}: refuses {self.after} prompts ({self.reference}: {self.before}); "
            f"first-token KL {self.first_token_kl:.4f}, over answers {self.answer_kl:.4f}"
        )


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
            f"{self.kl_mean:.4f}, top-1 agreement {self.top1_agreement:.1%}, on {self.tokens} tokens"
        )


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


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with the greedy answer of the subject."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class EvaluateReport(Report):
    """Measurements of `subject`.

    perplexity: per data set and "all"; interval: 95 % confidence interval of each. kl_* and
    top1_agreement compare token distributions with the checkpoint (mean over tokens of
    KL(checkpoint || subject) in nats; p99 over tokens); vs_current holds the same three against
    the committed state. baseline: the checkpoint's perplexity on the same tokens. steered: steering
    was in force on the subject, as it never is on the checkpoint. answers: figures of its greedy
    answers, answers_before: of the checkpoint's to the same prompts; None where none were asked for.
    """

    kind: ClassVar[str] = "evaluate"
    subject: ShownSide
    measured_state: str
    datasets: tuple[str, ...]
    perplexity: dict[str, float]
    interval: dict[str, tuple[float, float]]
    baseline: dict[str, float]
    tokens: int
    tokens_per_set: dict[str, int]
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    vs_current: dict[str, float] | None
    samples: tuple[Sample, ...]
    steered: bool
    answers: AnswerHealth | None = None
    answers_before: AnswerHealth | None = None

    @property
    def ratio(self) -> float:
        """Perplexity over the checkpoint's on the same tokens."""
        return self.perplexity["all"] / self.baseline["all"]

    def summary(self) -> str:
        low, high = self.interval["all"]
        how = f"{self.subject}, while steering" if self.steered else self.subject
        text = (
            f"{how}: perplexity {self.perplexity['all']:.3f} [{low:.3f}, {high:.3f}] "
            f"({self.ratio:.3f}x the checkpoint) over {self.tokens:,} tokens"
        )
        if self.kl_mean is not None:
            text += f", KL {self.kl_mean:.4f}, top-1 agreement {self.top1_agreement:.1%}"
        return text
