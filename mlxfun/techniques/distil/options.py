"""Options of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlxfun.data.options import DatasetOptions

Train = Literal["router", "moe"]
TRAINED: tuple[Train, ...] = get_args(Train)
"""What is trained: the routers, or routers, norms and the experts' projections."""

RATE = 3e-4
"""Adam's highest rate unless one is given."""

STEP_TOKENS = 2048
LEAST_STEP = 128
STEPS_OF_A_PASS = 16
"""A step has STEP_TOKENS tokens; of a short text fewer, so that a pass has about so many steps."""


@dataclass(frozen=True, slots=True)
class DistilOptions:
    """What is trained, and for how long.

    local: fit the routers layer by layer to the output of the checkpoint's experts instead of
    training through the whole model. passes: over the text. rate: Adam's highest, None for RATE.
    step_tokens: tokens of a step, None for `step_of`. seed: of the order of the steps. data: the text, None for that of
    the last collect.
    """

    train: Train = "router"
    local: bool = False
    passes: int = 3
    rate: float | None = None
    step_tokens: int | None = None
    seed: int = 0
    data: DatasetOptions | None = None

    def step_of(self, tokens: int) -> int:
        """Tokens of a step over a text of `tokens`.

        >>> DistilOptions().step_of(100_000), DistilOptions().step_of(8_000)
        (2048, 500)
        """
        if self.step_tokens is not None:
            return self.step_tokens
        return min(STEP_TOKENS, max(LEAST_STEP, tokens // STEPS_OF_A_PASS))
