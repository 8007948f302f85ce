"""`stats diff`, `merge`, `rank` and `purge` on `.npz` files of statistics; no model is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxfun.calibration import combine
from mlxfun.calibration.reports import CombineReport, DiffReport, DiffRow
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.files import Kind, json_with, write_json

DIFFERENCE = Kind("comparison of statistics", json_with("share_difference"))
SHOWN = 10
"""How many experts a comparison names."""


def diff_files(a: Path, b: Path, output: Path | None, allow_stale: bool = False) -> DiffReport:
    """Compare two files; with `output` write every number as JSON.

    Raises DatasetError, PlanError for files that cannot be compared, StateError for different
    weights unless it is allowed, SaveError for a file that cannot be written.
    """
    runs = [(path, RoutingStats.read(path)) for path in (a, b)]
    warnings = combine.require_alike(runs, allow_stale)
    (_, one), (_, two) = runs
    found = combine.diff(one, two)
    if output is not None:
        write_json(output, _document(runs, found), DIFFERENCE)
    return DiffReport(
        files=(str(a), str(b)),
        path=str(output) if output is not None else None,
        samples=(one.samples, two.samples),
        tokens=(one.tokens, two.tokens),
        rank_correlation=found.rank_correlation,
        overlap=found.overlap,
        rows=_rows(one, two),
        notices=warnings,
        layers=one.layer_indices,
        share=found.share,
    )


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
    files: tuple[Path, ...], output: Path, by: str = "sum", allow_stale: bool = False
) -> CombineReport:
    """Merge files into `output`. See mlxfun.calibration.combine for what `by` means and what is refused."""
    runs = [(path, RoutingStats.read(path)) for path in files]
    merged = combine.merge(runs, by, allow_stale)
    warnings = list(combine.require_alike(runs, allow_stale))
    if merged.state == combine.MIXED:
        warnings.append("the merge is of several states: prune takes it with --allow-stale only")
    if by == "rank":
        warnings.append("the sums are ranks, higher is better: not counts of tokens")
    return _written("merge", files, merged, output, tuple(warnings))


def purge_files(a: Path, b: Path, output: Path, allow_stale: bool = False) -> CombineReport:
    """Write A without B. Raises PlanError where B is no part of A."""
    whole, part = ((path, RoutingStats.read(path)) for path in (a, b))
    warnings = combine.require_alike((whole, part), allow_stale)
    return _written("purge", (a, b), combine.purge(whole, part, allow_stale), output, warnings)


def _written(
    action: str,
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
