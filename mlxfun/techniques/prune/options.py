"""Options of pruning, by metric or by hand.

Expert sets are `{decoder layer: (expert, ...)}`; experts keep the number they had in the
checkpoint for as long as the session lives, whatever was pruned before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mlxfun.calibration.options import METRICS, Metric
from mlxfun.data.options import ExpertSets, MapMode


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
    metric: Metric = "reap_sum"
    allow_stale: bool = False


PruneMetric = Literal[Metric, "output_error", "auto"]
PRUNE_METRICS: tuple[PruneMetric, ...] = (*METRICS, "output_error", "auto")
"""Of a prune: the statistics, or what is measured while pruning (see prune.calibrated)."""


Strategy = Literal["bottom", "strided"]
"""Of a layer's ranking: its end, or every n-th expert."""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Budget = Literal["equal", "global"]
"""The same count for each layer, or counts that are measured."""
BUDGETS: tuple[Budget, ...] = get_args(Budget)


SuperExperts = Literal["spare", "ignore"]
"""What a prune does about super experts; see mlxfun.techniques.prune.super_experts."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Which experts go. n_prune counts experts per layer (indices with model_wide).

    budget: "equal", or "global" for counts per layer that average to n_prune. sequential: each
    layer is judged on what the pruned layers before it put out. refit_experts: the experts that
    stay take over what went, by least squares. saliency: an `.npz` to load as the statistics first.
    super_experts: None spares them with the metric auto alone.
    """

    n_prune: int | None = None
    metric: PruneMetric = "reap_sum"
    strategy: Strategy = "bottom"
    model_wide: bool = False
    ignore_experts: tuple[int, ...] = ()
    min_experts_per_layer: int | None = None
    expert_list: Path | None = None
    safety_map: Path | None = None
    safety_mode: MapMode = "protect"
    domain_map: Path | None = None
    domain_mode: MapMode = "protect"
    allow_stale: bool = False
    budget: Budget = "equal"
    sequential: bool = False
    refit_experts: bool = False
    saliency: Path | None = None
    super_experts: SuperExperts | None = None

    @property
    def spares_super_experts(self) -> bool:
        """Whether experts with outlying activations never go."""
        return self.super_experts == "spare" or (
            self.super_experts is None and self.metric == "auto"
        )
