"""Arithmetic on routing statistics: difference, union and removal of runs.

* diff: how two runs rank the experts. Sums are compared as shares of their layer, so that runs of
  different length can be compared.
* merge by sum: as if one run had seen everything. Commutative, and associative up to the rounding
  of float64 (exactly so for counts).
* merge by rank: each run has the same say, however long it was or however large its activations.
  An expert's rank score in one run is (experts of its layer below it + half of those that tie
  with it) / E, in [0, 1): *higher is better*, 0 for one that was never routed. The merged file
  holds the sums of rank scores, metric by metric, so every metric still prunes the right experts;
  such sums can be merged on, in any order and grouping.
* subtract: what is left of A when B, a part of it, is taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.options import MERGE_RULES, METRICS, MergeRule, Metric
from mlxfun.calibration.routing_stats import RANKS, SUMS, RoutingStats
from mlxfun.checkpoint.identity import is_earlier
from mlxfun.data.scan_reports import Identity, earlier_notice
from mlxfun.errors import PlanError, StateError, UsageError

if TYPE_CHECKING:
    from mlxfun.arrays import Array

MIXED = "mixed"
"""State of a merge over several states: the present weights never match it by accident."""

ROUNDING = 1e-9
"""A remainder this small, relative to what was there, is rounding and becomes 0."""

Named = tuple[Path, RoutingStats]
Names = Callable[[Identity], Identity]


@dataclass(frozen=True, slots=True)
class Difference:
    """share: per metric, float64 [L, E], the share of the layer's total in A minus that in B.

    rank_correlation: per metric, Spearman's, the mean over layers. overlap: per metric, the part
    of the lowest quarter of experts that both agree on, mean over layers.
    """

    share: dict[Metric, Array]
    rank_correlation: dict[Metric, float]
    overlap: dict[Metric, float]


def read_runs(
    paths: Sequence[Path], known: Names | None = None
) -> tuple[list[Named], tuple[str, ...]]:
    """Statistics of files, under present names where `known` has them, and notices of those.

    known: the present name of an identity of an earlier version, as the resident model can tell;
    an identity that it does not know comes back as it is. Raises DatasetError.
    """
    runs, notices = [], []
    for path in paths:
        stats = RoutingStats.read(path)
        if known is not None and is_earlier(stats.model):
            now = known(Identity(stats.model, stats.state, stats.model_name))
            if now.model != stats.model:
                notices.append(earlier_notice(path))
                stats = replace(stats, model=now.model, state=now.state)
        runs.append((path, stats))
    return runs, tuple(notices)


def require_alike(runs: Sequence[Named], allow_stale: bool) -> tuple[str, ...]:
    """Warnings about runs of different weights; StateError, naming both, unless allowed.

    Runs of another shape, or combined in another way, cannot be made one: PlanError.
    """
    (first, a), warnings = runs[0], []
    for path, b in runs[1:]:
        if (a.shape, a.layer_indices) != (b.shape, b.layer_indices):
            raise PlanError(
                f"{first} has {a.shape[0]} layers x {a.shape[1]} experts in the decoder layers "
                f"{_span(a)}, {path} {b.shape[0]} x {b.shape[1]} in {_span(b)}; they are of "
                "different models"
            )
        for what, one, two in (
            ("the model", a.model_name or a.model, b.model_name or b.model),
            ("state", a.state, b.state),
        ):
            same = a.model == b.model if what == "the model" else one == two
            if same:
                continue
            if one == two:  # of one name, yet not the same
                one, two = f"{one} ({a.model})", f"{two} ({b.model})"
            text = (
                f"{first} was made on {what} {one or 'unknown'}, {path} on {what} "
                f"{two or 'unknown'}"
            )
            if is_earlier(a.model) != is_earlier(b.model) and a.model and b.model:
                old, new = (first, path) if is_earlier(a.model) else (path, first)
                text = (
                    f"{old} names its model by the identity of an earlier version, which cannot be "
                    f"compared with that of {new}; their shapes agree"
                )
                if not allow_stale:
                    raise StateError(
                        f"{text}. Load the model to have its old and new identity compared, or "
                        "combine them knowingly with --allow-stale"
                    )
                warnings.append(text)
                break  # states are named over the identity, so they cannot be compared either
            if not allow_stale:
                raise StateError(f"{text}; combine them knowingly with --allow-stale")
            warnings.append(text)
    return tuple(warnings)


def _span(stats: RoutingStats) -> str:
    return f"{stats.layer_indices[0]}..{stats.layer_indices[-1]}"


def diff(a: RoutingStats, b: RoutingStats) -> Difference:
    """Compare two runs, metric by metric, those that both have."""
    share, correlation, overlap = {}, {}, {}
    for metric in (metric for metric in a.metrics if metric in b.metrics):
        one, two = a.score(metric), b.score(metric)
        share[metric] = shares(one) - shares(two)
        correlation[metric] = _spearman(one, two)
        overlap[metric] = _overlap(one, two)
    return Difference(share, correlation, overlap)


def shares(score: Array) -> Array:
    """Each expert's share of its layer's total, [L, E]."""
    total = score.sum(axis=1, keepdims=True)
    result: Array = np.divide(score, total, out=np.zeros_like(score), where=total > 0)
    return result


def _spearman(one: Array, two: Array) -> float:
    """Mean over the layers of the correlation of ranks; layers without any order do not count."""
    found = []
    for x, y in zip(_ranks(one), _ranks(two), strict=True):
        x, y = x - x.mean(), y - y.mean()
        norm = float(np.sqrt((x @ x) * (y @ y)))
        if norm > 0:
            found.append(float(x @ y) / norm)
    return sum(found) / len(found) if found else 0.0


def _overlap(one: Array, two: Array) -> float:
    count = max(1, one.shape[1] // 4)
    one_low, two_low = (np.argsort(x, axis=1, kind="stable")[:, :count] for x in (one, two))
    agreed = sum(len(np.intersect1d(x, y)) for x, y in zip(one_low, two_low, strict=True))
    return agreed / one_low.size


def _ranks(score: Array) -> Array:
    """[L, E]: (experts of the layer below + half of the others that tie) / E."""
    below = (score[:, None, :] < score[:, :, None]).sum(axis=2)
    ties = (score[:, None, :] == score[:, :, None]).sum(axis=2) - 1
    result: Array = (below + ties / 2) / score.shape[1]
    return result


def rank_scores(score: Array) -> Array:
    """Rank scores [L, E] of scores [L, E] >= 0.

    >>> rank_scores(np.array([[5.0, 0.0, 7.0, 5.0]])).tolist()
    [[0.375, 0.0, 0.75, 0.375]]
    """
    return np.where(score > 0, _ranks(score), 0.0)


def ranked(stats: RoutingStats, metric: Metric | None = None) -> RoutingStats:
    """`stats` with every sum replaced by rank scores; those of a rank merge as they are.

    metric: by which alone; None: each sum by itself.
    """
    if stats.combined == "rank":
        if metric is None:
            return stats
        # Sums of rank scores of this metric: they go on as they are, under every name.
        alone = stats.score(metric)
        sums = dict.fromkeys((*SUMS, *RANKS.values()), alone)
        return replace(stats, sums=sums)
    if metric is not None:
        alone = rank_scores(stats.score(metric))
        sums = dict.fromkeys((*SUMS, *RANKS.values()), alone)
        return replace(stats, sums=sums, combined="rank")
    sums = {name: rank_scores(found) for name, found in stats.sums.items()}
    means = {name: metric for metric, name in RANKS.items() if metric in stats.metrics}
    sums |= {name: rank_scores(stats.score(metric)) for name, metric in means.items()}
    return replace(stats, sums=sums, combined="rank")


def merge(
    runs: Sequence[Named],
    by: MergeRule = "sum",
    allow_stale: bool = False,
    metric: Metric | None = None,
) -> RoutingStats:
    """One run from several. See the module's text for what `by` means.

    metric: with "rank", rank by this one alone: every metric of the merge then says what it says.

    Raises UsageError, and StateError for runs of different weights unless it is allowed.
    """
    if by not in MERGE_RULES:
        raise UsageError(f"--by {by!r}: choose one of {', '.join(MERGE_RULES)}")
    if len(runs) < 2:
        raise UsageError("a merge needs two or more files of statistics")
    require_alike(runs, allow_stale)
    if by == "sum":
        for path, stats in runs:
            if stats.combined == "rank":
                raise PlanError(f"{path} holds ranks, which cannot be summed; merge it --by rank")
    if metric is not None and by != "rank":
        raise UsageError(f"--metric {metric} goes with --by rank: a sum keeps every metric")
    parts = [ranked(stats, metric) if by == "rank" else stats for _, stats in runs]
    first = parts[0]
    states = {stats.state for stats in parts}
    same_model = len({stats.model for stats in parts}) == 1
    return RoutingStats(
        sums={name: _added([stats.sums[name] for stats in parts]) for name in _in_all(parts)},
        layer_indices=first.layer_indices,
        samples=sum(stats.samples for stats in parts),
        tokens=sum(stats.tokens for stats in parts),
        model=first.model if same_model else "",
        model_name=first.model_name if same_model else "",
        state=first.state if len(states) == 1 else MIXED,
        steered=any(stats.steered for stats in parts),
        combined=by,
        sources=sum(stats.sources for stats in parts),
        alive=alive_in_all(parts),
    )


def lacking(runs: Sequence[Named]) -> tuple[str, ...]:
    """A sentence per file without a metric that others have, which what is made of all has not."""
    known = {metric for _, stats in runs for metric in stats.metrics}
    found = []
    for path, stats in runs:
        if missing := ", ".join(metric for metric in METRICS if metric in known - {*stats.metrics}):
            found.append(f"{path} has no {missing}, so neither has what is made of it")
    return tuple(found)


def _in_all(runs: Sequence[RoutingStats]) -> list[str]:
    """Names of the sums that every run has."""
    return [name for name in runs[0].sums if all(name in stats.sums for stats in runs)]


def alive_in_all(runs: Sequence[RoutingStats]) -> Array | None:
    """bool [L, E]: the experts that could be chosen in every run that says so; None if none does."""
    known = [stats.alive for stats in runs if stats.alive is not None]
    return np.logical_and.reduce(known) if known else None


def _added(arrays: list[Array]) -> Array:
    """Their sum, the same bits in any order: equal elements are added smallest first."""
    result: Array = np.sort(np.stack(arrays), axis=0).sum(axis=0)
    return result


def subtract(whole: Named, part: Named, allow_stale: bool = False) -> RoutingStats:
    """A without B. Raises PlanError where B has more than A: then it is no part of it."""
    require_alike((whole, part), allow_stale)
    (path_a, a), (path_b, b) = whole, part
    for path, stats in (whole, part):
        if stats.combined == "rank":
            raise PlanError(f"{path} holds ranks, from which nothing can be taken away")
    sums = {}
    for name in _in_all([a, b]):
        left = a.sums[name] - b.sums[name]
        noise = ROUNDING * np.maximum(a.sums[name], b.sums[name])
        if (left < -noise).any():
            row, expert = np.unravel_index(int(np.argmin(left)), left.shape)
            raise PlanError(
                f"{path_b} is no part of {path_a}: {name} of layer {a.layer_indices[row]}, expert "
                f"{expert} would be {a.sums[name][row, expert]:g} - "
                f"{b.sums[name][row, expert]:g} < 0"
            )
        sums[name] = np.where(left > noise, left, 0.0)
    for what in ("samples", "tokens"):
        if getattr(b, what) > getattr(a, what):
            raise PlanError(
                f"{path_b} is no part of {path_a}: it has {getattr(b, what)} {what}, of "
                f"{getattr(a, what)}"
            )
    sums = {name: np.where(sums["freq"] > 0, left, 0.0) for name, left in sums.items()}
    return replace(
        a,
        sums=sums,
        samples=a.samples - b.samples,
        tokens=a.tokens - b.tokens,
        sources=max(1, a.sources - b.sources),
    )
