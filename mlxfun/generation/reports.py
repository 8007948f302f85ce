"""Reports on generated answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.events import Side
from mlxfun.generation.options import FinishReason
from mlxfun.report import Report
from mlxfun.text import counted


@dataclass(frozen=True, slots=True)
class Answer:
    """What one side said. label: what the side is; tokens: its pieces."""

    side: Side
    label: str
    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


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
        kl = f"mean KL {self.kl_mean:.4f} per token"
        where = self.first_divergence
        if where is None:
            return f"{self.base.label} and {self.candidate.label} give the same answer; {kl}"
        lengths = dict.fromkeys((len(self.base.tokens), len(self.candidate.tokens)))
        return (
            f"{self.base.label} and {self.candidate.label} diverge at token {where + 1} of "
            f"{' and '.join(map(str, lengths))}; {kl}"
        )


@dataclass(frozen=True, slots=True)
class ChatReport(Report):
    """One answer."""

    kind: ClassVar[str] = "chat"
    prompt: str
    text: str
    side: Side
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float
    finish_reason: FinishReason

    def summary(self) -> str:
        rate = f"{self.tokens_per_second:.1f} tokens/s"
        made = counted(self.generated_tokens, "token", "tokens")
        return f"{made} at {rate} ({self.finish_reason})"


@dataclass(frozen=True, slots=True)
class TokensReport(Report):
    """How long a text is. tokens: of the text alone; conversation: of the turns so far; prompt: of
    what would be read if it were asked now; context: what the model holds, None if not known.
    """

    kind: ClassVar[str] = "tokens"
    tokens: int
    conversation: int
    prompt: int
    context: int | None

    @property
    def fits(self) -> bool:
        """Whether the model's context holds it."""
        return self.context is None or self.prompt < self.context

    def summary(self) -> str:
        text = counted(self.tokens, "token", "tokens")
        if self.conversation:
            text += f", {self.prompt:,} with the conversation so far"
        if self.context is None:
            return text
        over = "" if self.fits else ": too long to be asked"
        return f"{text}; the model's context holds {self.context:,}{over}"
