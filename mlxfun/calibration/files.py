"""`stats diff`, `merge` and `subtract` on `.npz` files of statistics; no model is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlxfun.calibration import combine, filters
from mlxfun.calibration.options import MergeRule, Metric
from mlxfun.calibration.reports import CombineReport, DiffReport, DiffRow, Extreme, Figures
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.files import Kind, json_with, write_json

DIFFERENCE = Kind("comparison of statistics", json_with("share_difference"))
SHOWN = 10
"""How many experts a comparison names."""


def diff_files(
    a: Path,
    b: Path,
    output: Path | None,
    allow_stale: bool = False,
    metric: Metric = "reap",
    known: combine.Names | None = None,
) -> DiffReport:
    """Compare two files; with `output` write every number as JSON.

    metric: the one whose scores are subtracted for the figures. known: see `combine.read_runs`.

    Raises DatasetError, PlanError for files that cannot be compared, StateError for different
    weights unless it is allowed, SaveError for a file that cannot be written.
    """
    runs, notices = combine.read_runs((a, b), known)
    warnings = (*notices, *combine.require_alike(runs, allow_stale))
    (_, one), (_, two) = runs
    found = combine.diff(one, two)
    numbers = filters.figures(one, two, metric)
    if output is not None:
        write_json(output, _document(runs, found) | _figures(numbers), DIFFERENCE)
    return DiffReport(
        files=(str(a), str(b)),
        path=str(output) if output is not None else None,
        samples=(one.samples, two.samples),
        tokens=(one.tokens, two.tokens),
        rank_correlation=found.rank_correlation,
        overlap=found.overlap,
        rows=_rows(one, two),
        notices=(*warnings, *combine.lacking(runs)),
        layers=one.layer_indices,
        share=found.share,
        figures=numbers,
    )


def _figures(found: Figures) -> dict[str, Any]:
    """Under the names that other tools of the family read; layer_idx is a position."""
    return {
        "metric": found.metric,
        "diff_mean": found.mean,
        "diff_std": found.std,
        "diff_min": found.min,
        "diff_max": found.max,
        "diff_abs_max": max(abs(found.min), abs(found.max)),
        "positive_count": found.positive,
        "negative_count": found.negative,
        "zero_count": found.zero,
        "top_positive": _extremes(found.higher),
        "top_negative": _extremes(found.lower),
    }


def _extremes(found: tuple[Extreme, ...]) -> list[dict[str, Any]]:
    return [
        {
            "layer_idx": one.position,
            "expert_idx": one.expert,
            "diff_value": one.difference,
            "layer": one.layer,
        }
        for one in found
    ]


def _document(runs: list[combine.Named], found: combine.Difference) -> dict[str, Any]:
    rows, experts = runs[0][1].shape
    return {
        "num_layers": rows,
        "num_experts": experts,
        "layer_indices": list(runs[0][1].layer_indices),
        "files": [
            {"name": path.name, "samples": s.samples, "tokens": s.tokens, "state": s.state}
            for path, s in runs
        ],
        "share_difference": {k: v.tolist() for k, v in found.share.items()},
        "rank_correlation": found.rank_correlation,
        "overlap": found.overlap,
    }


def _rows(one: RoutingStats, two: RoutingStats) -> tuple[DiffRow, ...]:
    a, b = (combine.shares(stats.score("reap_sum")) for stats in (one, two))
    order = np.argsort(-np.abs(a - b), axis=None, kind="stable")[:SHOWN]
    cells = zip(*np.unravel_index(order, a.shape), strict=True)
    return tuple(
        DiffRow(one.layer_indices[r], int(e), float(a[r, e]), float(b[r, e]))
        for r, e in cells
        if a[r, e] != b[r, e]
    )


def merge_files(
    files: tuple[Path, ...],
    output: Path,
    by: MergeRule = "sum",
    allow_stale: bool = False,
    metric: Metric | None = None,
    known: combine.Names | None = None,
) -> CombineReport:
    """Merge files into `output`. See mlxfun.calibration.combine for what `by` means and what is refused."""
    runs, notices = combine.read_runs(files, known)
    merged = combine.merge(runs, by, allow_stale, metric)
    warnings = [*notices, *combine.require_alike(runs, allow_stale), *combine.lacking(runs)]
    if merged.state == combine.MIXED:
        warnings.append("the merge is of several states: prune takes it with --allow-stale only")
    if by == "rank":
        what = f"ranks by {metric}, under the name of every metric" if metric else "ranks"
        warnings.append(f"the sums are {what}, higher is better: not counts of tokens")
    return _written("merge", files, merged, output, tuple(warnings))


def subtract_files(
    a: Path,
    b: Path,
    output: Path,
    allow_stale: bool = False,
    known: combine.Names | None = None,
) -> CombineReport:
    """Write A without B. Raises PlanError where B is no part of A."""
    (whole, part), notices = combine.read_runs((a, b), known)
    warnings = combine.require_alike((whole, part), allow_stale)
    left = combine.subtract(whole, part, allow_stale)
    said = (*notices, *warnings, *combine.lacking((whole, part)))
    return _written("subtract", (a, b), left, output, said)


def _written(
    action: Literal["merge", "subtract"],
    files: tuple[Path, ...],
    stats: RoutingStats,
    output: Path,
    notices: tuple[str, ...],
) -> CombineReport:
    stats.save(output)
    return CombineReport(
        action=action,
        files=tuple(map(str, files)),
        path=str(output),
        combined=stats.combined,
        sources=stats.sources,
        layers=stats.layer_indices,
        experts=stats.shape[1],
        samples=stats.samples,
        tokens=stats.tokens,
        model=stats.model_name or stats.model,
        state=stats.state,
        notices=notices,
    )
