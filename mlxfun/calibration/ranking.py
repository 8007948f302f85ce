"""Experts that several calibration runs agree are least important, by summed ranks.

An expert's rank in one run is 1 + the number of experts of its layer that score higher, so that 1
is the busiest and ties share the better rank. Ranks are summed over the runs; the largest sums go
first, equal ones by higher index. An expert may go only if its rank lies within the limits in
*every* run: a lower limit spares whoever is important to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration import combine
from mlxfun.calibration.options import Metric
from mlxfun.calibration.reports import RankReport, RankRow
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.data.expert_lists import Maker, write_expert_list
from mlxfun.errors import PlanError, UsageError

if TYPE_CHECKING:
    from mlxfun.arrays import Array

MOST_FILES = 4
SHOWN = 10


@dataclass(frozen=True, slots=True)
class RankOptions:
    """What is ranked by, and who may go. n_prune: per layer, or expert numbers with model_wide;
    None: everybody within the limits. min_rank, max_rank: both inside, None for no limit."""

    metric: Metric = "reap_sum"
    n_prune: int | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    model_wide: bool = False
    allow_stale: bool = False


def ranks(score: Array) -> Array:
    """Rank of each expert in its layer, int64 [L, E] of scores [L, E].

    >>> ranks(np.array([[5.0, 0.0, 7.0, 5.0]])).tolist()
    [[2, 4, 1, 2]]
    """
    result: Array = 1 + (score[:, None, :] > score[:, :, None]).sum(axis=2)
    return result


def choose(
    found: Sequence[Array], options: RankOptions, alive: Array | None = None
) -> tuple[Array, Array]:
    """(summed ranks int64 [L, E], who goes bool [L, E]) of the ranks in each run.

    alive: bool [L, E], who may go at all; None: everybody.

    Raises UsageError for options that choose nobody in particular, PlanError when fewer experts
    than asked for are within the limits.
    """
    low, high = options.min_rank, options.max_rank
    if options.n_prune is None and low is None and high is None:
        raise UsageError("say which experts to prune: --n-prune N, or --min-rank and --max-rank")
    if low is not None and high is not None and low > high:
        raise UsageError(f"--min-rank {low} is above --max-rank {high}: no expert is within")
    stack = np.stack(found)
    total: Array = stack.sum(axis=0)
    free = np.logical_and(
        (stack >= (low or 1)).all(axis=0), (stack <= (high or stack.shape[2])).all(axis=0)
    )
    if alive is not None:
        free &= alive
    if options.model_wide:
        everywhere = np.asarray(free.all(axis=0))
        gone = _largest(total.sum(axis=0), everywhere, options, "in every layer")
        return total, np.broadcast_to(gone, total.shape).copy()
    rows = [
        _largest(row, able, options, f"of layer position {at}")
        for at, (row, able) in enumerate(zip(total, free, strict=True))
    ]
    return total, np.stack(rows)


def _largest(total: Array, free: Array, options: RankOptions, where: str) -> Array:
    """Who goes of one layer, bool [E]."""
    if options.n_prune is None:
        return free
    able = np.flatnonzero(free)
    if len(able) < options.n_prune:
        raise PlanError(
            f"only {len(able)} experts {where} are within the rank limits, {options.n_prune} are to be "
            "pruned: widen --min-rank and --max-rank, or lower --n-prune"
        )
    order = sorted(able.tolist(), key=lambda e: (-int(total[e]), -e))
    gone = np.zeros(len(total), dtype=np.bool_)
    gone[order[: options.n_prune]] = True
    return gone


def rank_files(
    files: Sequence[Path],
    options: RankOptions,
    output: Path | None = None,
    alive: Array | None = None,
    known: combine.Names | None = None,
) -> RankReport:
    """Rank the experts by two to four files; with `output` write who stays as an expert list.

    alive: bool [L, E], who is there in the model that the choice is for. Experts that the files say
    were pruned are left out as well. known: see `combine.read_runs`.

    Raises UsageError for another number of files, PlanError for files of another shape than the
    model's, and what `combine.require_alike` raises.
    """
    if not 2 <= len(files) <= MOST_FILES:
        raise UsageError(f"stats rank compares 2 to {MOST_FILES} files, not {len(files)}")
    runs, notices = combine.read_runs(files, known)
    warnings = (*notices, *combine.require_alike(runs, options.allow_stale))
    each = [ranks(stats.ranking_score(options.metric)) for _, stats in runs]
    living = _living([stats for _, stats in runs], alive)
    total, gone = choose(each, options, living)
    layers = runs[0][1].layer_indices
    chosen = {
        layer: tuple(int(e) for e in np.flatnonzero(row))
        for layer, row in zip(layers, gone, strict=True)
    }
    if output is not None:
        stays = [tuple(np.flatnonzero(row).tolist()) for row in living & ~gone]
        write_expert_list(
            output,
            dict(zip(layers, stays, strict=True)),
            total.shape[1],
            _maker([stats for _, stats in runs]),
        )
    return RankReport(
        files=tuple(map(str, files)),
        metric=options.metric,
        path=str(output) if output is not None else None,
        layers=layers,
        experts=int(total.shape[1]),
        chosen=chosen,
        rows=_rows(np.where(living, total, 0), each, layers),
        notices=warnings,
    )


def _living(runs: Sequence[RoutingStats], alive: Array | None) -> Array:
    """bool [L, E]: alive in the model, and in every file that says so."""
    shape = runs[0].shape
    if alive is not None and alive.shape != shape:
        raise PlanError(
            f"the files are of {shape[0]} layers x {shape[1]} experts, and the model has "
            f"{alive.shape[0]} x {alive.shape[1]}; collect on this model"
        )
    recorded = combine.alive_in_all(runs)
    living = np.ones(shape, dtype=np.bool_)
    for known in (recorded, alive):
        living &= True if known is None else known
    return living


def _maker(runs: Sequence[RoutingStats]) -> Maker:
    """The model that all runs were made on."""
    same = len({stats.model for stats in runs}) == 1
    return Maker(runs[0].model, runs[0].model_name) if same else Maker()


def _rows(total: Array, each: Sequence[Array], layers: Sequence[int]) -> tuple[RankRow, ...]:
    """The experts with the largest sums, over the whole model; a sum of 0 is no expert's."""
    order = np.argsort(-total, axis=None, kind="stable")[:SHOWN]
    cells = zip(*np.unravel_index(order, total.shape), strict=True)
    return tuple(
        RankRow(layers[r], int(e), tuple(int(one[r, e]) for one in each), int(total[r, e]))
        for r, e in cells
        if total[r, e]
    )
