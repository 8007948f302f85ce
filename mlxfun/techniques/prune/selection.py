"""Selection of the experts to prune: pure functions `(scores, constraints, options) -> Selection`.

Every rule here serves one fact: stock loading holds a single expert count, so each layer loses
the same number, and a grouped router needs the same number in each of its groups.

Order of condemnation among the experts that may go: targeted ones first, then by ascending score,
equal scores by less traffic, equal traffic by higher index. Experts never routed to score 0 and
so go before every other untargeted one. Protected, ignored and already pruned ones never go;
where an expert is both protected and targeted, protection wins.

    bottom      the n first in that order
    strided     of the E candidates, the n lowest are the unimportant half and the rest the
                important one; half of n comes from each, at even strides from its low end
                (E = 160, n = 40: every 2nd of the 40, every 6th of the 120). An odd n takes one
                more from the unimportant half. Targeted experts go first and count towards n.
    model-wide  scores are divided by their layer's sum (experts with one index are unrelated
                across layers, so layers must weigh the same), then summed over the layers; the
                same n indices go everywhere. An index goes only if it is alive in every layer and
                protected in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.errors import PlanError, UsageError
from mlxfun.techniques.prune.constraints import Constraints, Scores
from mlxfun.techniques.prune.limits import _groups, _Limits, _model_groups
from mlxfun.techniques.prune.options import STRATEGIES, PruneOptions, Strategy


@dataclass(frozen=True, slots=True)
class Selection:
    """keep: for each layer the experts that stay, ascending. warnings: sentences for the user."""

    keep: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Candidates of one layer (or of the model as a whole), first to go first.

    order: expert indices that may go. targeted: how many of them, at the front, are targeted.
    """

    order: tuple[int, ...]
    targeted: int

    def within(self, members: range) -> _Ranking:
        """The candidates inside one group."""
        front = sum(e in members for e in self.order[: self.targeted])
        return _Ranking(tuple(e for e in self.order if e in members), front)


def select(scores: Scores, constraints: Constraints, options: PruneOptions) -> Selection:
    """Choose the experts that stay. scores: float64 [L, E], higher is more important.

    Raises UsageError for options that are wrong in themselves and PlanError for a selection that
    this model does not allow, naming the layer, the figures and the largest possible --n-prune.
    """
    count = _checked_count(options)
    _check_scores(scores, constraints)
    protect = protected(constraints, options)
    target = constraints.target & ~protect
    limits = _Limits.of(constraints, protect, options)
    limits.check(count, constraints)
    if options.model_wide:
        gone = _model_wide(scores, constraints, protect, target, options)
        condemned = [gone] * len(constraints.layers)
    else:
        rankings = _layer_rankings(scores, constraints, protect, target)
        condemned = [
            _take_from_groups(ranking, _groups(constraints, i), count, options.strategy)
            for i, ranking in enumerate(rankings)
        ]
    keep = tuple(
        tuple(int(e) for e in np.flatnonzero(alive) if int(e) not in gone)
        for alive, gone in zip(constraints.alive, condemned, strict=True)
    )
    return Selection(keep, _warnings(constraints, protect, target, keep))


def adopt(
    keep: Mapping[int, Sequence[int]], constraints: Constraints, options: PruneOptions
) -> Selection:
    """A list made elsewhere as a selection, under the same constraints as a computed one.

    keep: {decoder layer: experts that stay} for every MoE layer. Raises UsageError for options
    that choose experts, since the list has chosen, and PlanError when the list removes protected
    experts or keeps fewer than --min-experts-per-layer.
    """
    chosen = {
        f"--n-prune {options.n_prune}": options.n_prune is not None,
        "--model-wide": options.model_wide,
        f"--strategy {options.strategy}": options.strategy != STRATEGIES[0],
    }
    surplus = [name for name, given in chosen.items() if given]
    if surplus:
        raise UsageError(
            f"--expert-list already says which experts to prune; leave out {' and '.join(surplus)}"
        )
    protect = protected(constraints, options)
    _require_spared(keep, constraints, protect)
    least = options.min_experts_per_layer or 0
    for layer, staying in keep.items():
        if len(staying) < least:
            raise PlanError(
                f"the list keeps {len(staying)} experts in layer {layer}, fewer than "
                f"--min-experts-per-layer {least}; change the list or the option"
            )
    kept = tuple(tuple(keep[layer]) for layer in constraints.layers)
    target = constraints.target & constraints.alive & ~protect
    return Selection(kept, _warnings(constraints, protect, target, kept))


def _require_spared(
    keep: Mapping[int, Sequence[int]], constraints: Constraints, protect: Mask
) -> None:
    """Raise PlanError naming the living protected experts that the list removes."""
    gone = []
    for i, layer in enumerate(constraints.layers):
        staying = set(keep.get(layer, ()))
        gone += [
            f"L{layer}:E{int(e)}"
            for e in np.flatnonzero(protect[i] & constraints.alive[i])
            if int(e) not in staying
        ]
    if gone:
        shown = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
        raise PlanError(
            f"the list removes {len(gone)} protected experts: {shown}; change the list or the map"
        )


def _checked_count(options: PruneOptions) -> int:
    if options.n_prune is None:
        raise UsageError("prune needs --n-prune N, the number of experts to remove")
    if options.n_prune < 1:
        raise UsageError(f"--n-prune {options.n_prune} must be at least 1")
    if options.strategy not in STRATEGIES:
        raise UsageError(f"--strategy {options.strategy}: choose one of {', '.join(STRATEGIES)}")
    least = options.min_experts_per_layer
    if least is not None and least < 1:
        raise UsageError(f"--min-experts-per-layer {least} must be at least 1")
    return options.n_prune


def _check_scores(scores: Scores, constraints: Constraints) -> None:
    if scores.shape != constraints.shape:
        raise PlanError(
            f"the scores are for {scores.shape[0]} layers x {scores.shape[-1]} experts, the model "
            f"has {constraints.shape[0]} x {constraints.shape[1]}; collect statistics on this model"
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        layer, expert = constraints.layers[int(bad[0][0])], int(bad[0][1])
        raise PlanError(
            f"the score of L{layer}:E{expert} is {scores[tuple(bad[0])]}; the statistics are "
            "damaged, collect them again"
        )


def protected(constraints: Constraints, options: PruneOptions) -> Mask:
    """bool [L, E]: protected by a map or named with --ignore-experts."""
    experts = constraints.shape[1]
    unknown = [e for e in options.ignore_experts if not 0 <= e < experts]
    if unknown:
        raise PlanError(
            f"--ignore-experts names {', '.join(map(str, unknown))}; the experts of this model "
            f"are 0..{experts - 1}"
        )
    protect = constraints.protect.copy()
    protect[:, list(options.ignore_experts)] = True
    return protect


def _ranking(score: Scores, traffic: Scores, candidates: Mask, target: Mask) -> _Ranking:
    """All arguments [E]."""
    index = np.arange(len(score))
    # lexsort takes its most significant key last.
    order = np.lexsort((-index, traffic, score, ~target))
    chosen = tuple(int(e) for e in order if candidates[e])
    return _Ranking(chosen, int((target & candidates).sum()))


def _layer_rankings(
    scores: Scores, constraints: Constraints, protect: Mask, target: Mask
) -> list[_Ranking]:
    traffic = _traffic(constraints)
    candidates = np.logical_and(constraints.alive, ~protect)
    return [
        _ranking(scores[i], traffic[i], candidates[i], target[i])
        for i in range(len(constraints.layers))
    ]


def _model_wide(
    scores: Scores, constraints: Constraints, protect: Mask, target: Mask, options: PruneOptions
) -> frozenset[int]:
    alive = constraints.alive
    living = np.where(alive, scores, 0.0)
    mass = living.sum(axis=1, keepdims=True)
    shares = np.divide(living, mass, out=np.zeros_like(living), where=mass > 0)
    ranking = _ranking(
        shares.sum(axis=0),
        _traffic(constraints).sum(axis=0),
        np.asarray(np.logical_and(alive, ~protect).all(axis=0)),
        np.asarray(target.any(axis=0)),
    )
    groups = _model_groups(constraints)
    return _take_from_groups(ranking, groups, options.n_prune or 0, options.strategy)


def _traffic(constraints: Constraints) -> Scores:
    if constraints.traffic is None:
        return np.zeros(constraints.shape)
    return constraints.traffic


def _take_from_groups(
    ranking: _Ranking, groups: list[range], count: int, strategy: Strategy
) -> frozenset[int]:
    share = count // len(groups)
    take = _strided if strategy == "strided" else _bottom
    return frozenset(e for group in groups for e in take(ranking.within(group), share))


def _bottom(ranking: _Ranking, count: int) -> tuple[int, ...]:
    return ranking.order[:count]


def _strided(ranking: _Ranking, count: int) -> tuple[int, ...]:
    """The module docstring's rule; the important half gives what it can, the other the rest."""
    first = ranking.order[: min(ranking.targeted, count)]
    order, count = ranking.order[len(first) :], count - len(first)
    unimportant, important = order[:count], order[count:]
    high = min(count // 2, len(important))
    return first + _every(unimportant, count - high) + _every(important, high)


def _every(ordered: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` elements at the widest even stride, beginning with the first."""
    if count == 0:
        return ()
    return ordered[:: len(ordered) // count][:count]


def warnings_of(
    constraints: Constraints, keep: tuple[tuple[int, ...], ...], options: PruneOptions
) -> tuple[str, ...]:
    """What users should know of a selection that was made elsewhere."""
    protect = protected(constraints, options)
    return _warnings(constraints, protect, constraints.target & ~protect, keep)


def _warnings(
    constraints: Constraints, protect: Mask, target: Mask, keep: tuple[tuple[int, ...], ...]
) -> tuple[str, ...]:
    warnings = []
    both = int((constraints.target & protect & constraints.alive).sum())
    if both:
        warnings.append(f"{both} targeted experts are protected too, and stay")
    rows = range(len(keep))
    left = sum(int(target[i, list(keep[i])].sum()) for i in rows)
    if left:
        warnings.append(
            f"{left} targeted experts stay: give a larger --n-prune, or a list without them"
        )
    tight = [constraints.layers[i] for i in rows if len(keep[i]) == constraints.top_k[i]]
    if tight:
        warnings.append(
            f"{len(keep[0])} experts are left, exactly the top-k: every token uses all of them "
            "and the router chooses nothing any more"
        )
    return tuple(warnings)
