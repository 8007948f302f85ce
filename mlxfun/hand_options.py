"""Options of what a person does by hand: pick experts, probe, compare two sides."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxfun.options import DatasetOptions, ExpertSets

PROBE_TOKENS = 512
DOSSIER_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class SelectOptions:
    """A change of the hand selection. drop and keep name experts that shall go, or stay after all.

    clear: start from nothing instead of from the staged plan. below: everything with a smaller
    share of its layer's metric goes too. n_prune: bring every layer to this many that go; even:
    to as many as go from the layer that loses most. metric: what below, n_prune and even go by.
    """

    drop: ExpertSets = field(default_factory=dict)
    keep: ExpertSets = field(default_factory=dict)
    clear: bool = False
    below: float | None = None
    n_prune: int | None = None
    even: bool = False
    metric: str = "reap_sum"
    allow_stale: bool = False


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """A quick look, at the staged plan or at one expert. data None: the held-out part of the calibration set."""

    data: DatasetOptions | None = None
    tokens: int = PROBE_TOKENS
