"""Options of applying a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """Guardrails of apply; with any set, a missing preview is made first. max_loops: the share of
    answers that may go round in circles, beside the checkpoint's own share."""

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    max_loops: float | None = None
