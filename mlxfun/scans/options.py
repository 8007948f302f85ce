"""Options of a differential scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxfun.data.options import DatasetOptions


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """A comparison of two sets: harmful and benign, or a domain and general text.

    output: where the report goes. alpha bounds the false discovery rate among flagged experts.
    domain_name: of a domain scan.
    """

    first: DatasetOptions
    second: DatasetOptions
    output: Path
    threshold_percentile: float = 90.0
    alpha: float = 0.01
    domain_name: str = ""
