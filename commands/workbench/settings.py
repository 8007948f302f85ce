"""Defaults that the command `set` changes."""

from __future__ import annotations

from dataclasses import dataclass

from mlxfun.calibration.options import Metric


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults for options that a command line leaves out.

    dataset: the last one named, or those of a mixture. max_kl, max_perplexity_ratio, max_loops: the
    guardrails of apply, None for off.
    undo_steering: whether steering is a step of the history that undo takes back.
    """

    seed: int = 0
    dataset: str | tuple[str, ...] | None = None
    metric: Metric = "reap_sum"
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    max_loops: float | None = None
    undo_steering: bool = True
