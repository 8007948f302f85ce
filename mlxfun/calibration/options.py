"""Options of calibration, and the names of the metrics it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mlxfun.data.options import DatasetOptions

Metric = Literal["freq", "weighted_freq", "reap", "ean", "reap_sum", "reap_sq", "man", "msan"]
"""What experts are scored by; see mlxfun.calibration.routing_stats."""
METRICS: tuple[Metric, ...] = get_args(Metric)

MergeRule = Literal["sum", "rank"]
"""How runs are merged: sums are added, or each run's ranks are."""
MERGE_RULES: tuple[MergeRule, ...] = get_args(MergeRule)

Combined = Literal[MergeRule, ""]
"""How statistics were merged, "" for those of one run."""


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Calibration. batch_tokens bounds a padded batch (rows x longest row), max_batch its rows.

    None: what suits the device. add: to the statistics in hand instead of starting anew. known: an
    `.npz` that this very calibration made before; it is read and nothing runs.
    """

    data: DatasetOptions
    batch_tokens: int | None = None
    max_batch: int | None = None
    add: bool = False
    known: Path | None = None
