"""Figures of a difference between two runs, and removal of what too few tokens were routed to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.archive import Archive
from mlxfun.calibration.options import Metric
from mlxfun.calibration.reports import Extreme, Figures, PurgeReport
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.errors import PlanError, UsageError
from mlxfun.text import counted

if TYPE_CHECKING:
    from mlxfun.arrays import Array

EXTREMES = 10
"""Experts named at each end of a difference."""


def figures(a: RoutingStats, b: RoutingStats, metric: Metric) -> Figures:
    """Figures of (score in A - score in B) over all experts of all layers."""
    difference = a.score(metric) - b.score(metric)
    order = np.argsort(difference, axis=None, kind="stable")
    return Figures(
        metric=metric,
        mean=float(difference.mean()),
        std=float(difference.std()),
        min=float(difference.min()),
        max=float(difference.max()),
        positive=int((difference > 0).sum()),
        negative=int((difference < 0).sum()),
        zero=int((difference == 0).sum()),
        higher=_extremes(difference, order[::-1], a.layer_indices, 1),
        lower=_extremes(difference, order, a.layer_indices, -1),
    )


def _extremes(
    difference: Array, order: Array, layers: tuple[int, ...], sign: int
) -> tuple[Extreme, ...]:
    rows, experts = np.unravel_index(order[:EXTREMES], difference.shape)
    return tuple(
        Extreme(layers[row], int(row), int(expert), float(difference[row, expert]))
        for row, expert in zip(rows, experts, strict=True)
        if sign * difference[row, expert] > 0
    )


def purge_file(
    path: Path,
    output: Path,
    min_freq: int | None = None,
    min_count: int | None = None,
    max_norm: float | None = None,
) -> PurgeReport:
    """Write `path` with zeros for the experts that the filters take out.

    min_freq: tokens routed to an expert; min_count: tokens with a measured output norm (the same
    number, except in files of servers that do not measure norms). max_norm: experts with a larger
    mean output norm are counted and warned of; a sum cannot be capped.

    Raises UsageError without any filter, DatasetError for a file that is no statistics, PlanError
    for ranks, SaveError when the file cannot be written.
    """
    if min_freq is None and min_count is None and max_norm is None:
        raise UsageError("stats purge: give --min-freq N, --min-count N or --max-norm X")
    stats = RoutingStats.read(path)
    if stats.combined == "rank":
        raise PlanError(f"{path} holds ranks, which count no tokens; purge the runs it is made of")
    freq = stats.sums["freq"]
    archive = Archive(path)
    measured = archive.sums("reap_count") if "reap_count" in archive else freq
    rare = freq < (min_freq or 0)
    unmeasured = measured < (min_count or 0)
    gone = rare | unmeasured
    kept = replace(stats, sums={name: np.where(gone, 0.0, s) for name, s in stats.sums.items()})
    loud = int((kept.score("man") > max_norm).sum()) if max_norm is not None else 0
    kept.save(output)
    return PurgeReport(
        files=(str(path),),
        path=str(output),
        experts=int(freq.size),
        by_freq=int(rare.sum()),
        by_count=int(unmeasured.sum()),
        purged=int(gone.sum()),
        kept=int((~gone).sum()),
        above_norm=loud,
        notices=_warnings(loud, max_norm, int((gone & (freq > 0)).sum())),
    )


def _warnings(loud: int, max_norm: float | None, emptied: int) -> tuple[str, ...]:
    found = []
    if emptied:
        found.append(
            f"{counted(emptied, 'expert that was routed to scores', 'experts that were routed to score')} "
            f"0 now, so prune takes {'it' if emptied == 1 else 'them'} first"
        )
    if loud and max_norm is not None:
        found.append(
            f"{counted(loud, 'expert has', 'experts have')} a mean output norm above {max_norm:g}; kept "
            "as before, since a sum cannot be capped"
        )
    return tuple(found)
