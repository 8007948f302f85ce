"""Options of applying a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """Guardrails of apply; with any set, a missing preview is made first."""

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
