"""Options of calibration, and the names of the metrics it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxfun.data.options import DatasetOptions

METRICS = ("freq", "weighted_freq", "reap", "ean", "reap_sum", "reap_sq", "man", "msan")


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
