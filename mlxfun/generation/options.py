"""Options of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from mlxfun.data.options import require_seed
from mlxfun.errors import UsageError
from mlxfun.events import Side

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: the model's end of turn, the longest that was asked for, or a cancel."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Decoding. side: "live" for the one that is. Raises UsageError for impossible numbers."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    side: Literal["live", Side] = "live"
    system: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not 0 <= self.temperature < inf:
            raise UsageError(f"--temperature {self.temperature:g} must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g} must be above 0 and at most 1")
