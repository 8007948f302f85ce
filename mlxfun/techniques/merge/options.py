"""Options of merging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mlxfun.calibration.options import Metric
from mlxfun.data.options import DatasetOptions, MapMode

SimilarityMode = Literal["gated", "average"]
SIMILARITY_MODES: tuple[SimilarityMode, ...] = get_args(SimilarityMode)

Alignment = Literal["hungarian", "greedy", "none"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Which experts are merged away, and how. n_prune: see PruneOptions.

    data: what the experts are compared on, None for the text of the last collect; samples that the
    collect held out are left out of it. metric: the saliency that picks centroids and weighs
    members. expert_list: names the centroids. auto: members are merged only where that serves the
    layer's output better than dropping them. saliency: an `.npz` whose scores pick the centroids and
    weigh the members, instead of what each layer sees of the data on merged inputs. refit_experts: as in PruneOptions. max_*_tokens: how many tokens, evenly spread over
    the data, experts are compared and aligned on; saliency uses all of them.
    """

    data: DatasetOptions | None = None
    n_prune: int | None = None
    metric: Metric = "reap_sum"
    model_wide: bool = False
    ignore_experts: tuple[int, ...] = ()
    expert_list: Path | None = None
    similarity_mode: SimilarityMode = "gated"
    alignment: Alignment = "hungarian"
    max_group_size: int = 16
    max_similarity_tokens: int = 1024
    max_alignment_tokens: int = 1024
    safety_map: Path | None = None
    safety_mode: MapMode = "protect"
    domain_map: Path | None = None
    domain_mode: MapMode = "protect"
    allow_stale: bool = False
    auto: bool = False
    refit_experts: bool = False
    saliency: Path | None = None
