"""What holds for every selection, over random models; and against a naive twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxfun.errors import PlanError
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.selection import select

# --- invariants ------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Constraints, PruneOptions]:
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    experts = groups * draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    shape = (layers, experts)
    scores = rng.integers(0, 6, shape).astype(float)
    dead = draw(st.integers(0, 1))
    alive = np.ones(shape, dtype=np.bool_)
    for row in alive.reshape(layers, groups, -1):
        for group in row:
            group[rng.permutation(group.size)[:dead]] = False
    constraints = Constraints(
        layers=tuple(range(1, layers + 1)),
        alive=alive,
        protect=rng.random(shape) < draw(st.sampled_from((0.0, 0.2))),
        target=rng.random(shape) < draw(st.sampled_from((0.0, 0.3))),
        top_k=(draw(st.integers(1, 3)),) * layers,
        n_group=(groups,) * layers,
        topk_group=(draw(st.integers(1, groups)),) * layers,
        traffic=rng.integers(0, 3, shape).astype(float),
    )
    options = PruneOptions(
        n_prune=draw(st.integers(1, experts)),
        strategy=draw(st.sampled_from(("bottom", "strided"))),
        model_wide=draw(st.booleans()),
        ignore_experts=tuple(draw(st.sets(st.integers(0, experts - 1), max_size=2))),
    )
    return scores, constraints, options


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_selection_respects_every_constraint(
    case: tuple[Any, Constraints, PruneOptions],
) -> None:
    scores, constraints, options = case
    try:
        result = select(scores, constraints, options)
    except PlanError:
        return  # whether refusals are right is the next test's question
    spared = constraints.protect.copy()
    spared[:, list(options.ignore_experts)] = True
    removed = []
    for i, kept in enumerate(result.keep):
        alive = set(np.flatnonzero(constraints.alive[i]).tolist())
        gone = alive - set(kept)
        removed.append(gone)
        assert list(kept) == sorted(kept)
        assert set(kept) <= alive
        assert len(gone) == options.n_prune
        assert len(kept) >= constraints.top_k[i]
        assert not any(spared[i, e] for e in gone)
        size = constraints.shape[1] // constraints.n_group[i]
        counts = [sum(e // size == g for e in kept) for g in range(constraints.n_group[i])]
        assert len(set(counts)) == 1
        if constraints.n_group[i] > 1:
            assert counts[0] >= 2
            assert constraints.top_k[i] <= constraints.topk_group[i] * counts[0]
        if options.strategy == "bottom" and not options.model_wide:
            assert gone == naive_bottom(scores, constraints, spared, i, options.n_prune or 0)
    if options.model_wide:
        assert all(gone == removed[0] for gone in removed)


def naive_bottom(scores: Any, constraints: Constraints, spared: Any, i: int, n: int) -> set[int]:
    """Remove one expert at a time: the worst of the group that still owes most."""
    groups = constraints.n_group[i]
    size = constraints.shape[1] // groups
    assert constraints.traffic is not None
    gone: set[int] = set()
    for turn in range(n):
        group = turn % groups
        worst = None
        for e in range(group * size, (group + 1) * size):
            if not constraints.alive[i, e] or spared[i, e] or e in gone:
                continue
            targeted = constraints.target[i, e] and not spared[i, e]
            rank = (not targeted, scores[i, e], constraints.traffic[i, e], -e)
            if worst is None or rank < worst[0]:
                worst = (rank, e)
        assert worst is not None
        gone.add(worst[1])
    return gone


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_refusal_is_right_that_nothing_possible_was_asked_for(
    case: tuple[Any, Constraints, PruneOptions],
) -> None:
    """The maximum named in a refusal works, and nothing above it does."""
    scores, constraints, options = case

    def possible(n: int) -> bool:
        try:
            select(scores, constraints, replace(options, n_prune=n))
        except PlanError:
            return False
        return True

    experts = constraints.shape[1]
    works = [n for n in range(1, experts + 1) if possible(n)]
    try:
        select(scores, constraints, replace(options, n_prune=experts))
        pytest.fail("all experts of a layer cannot go")
    except PlanError as error:
        text = str(error)
    if works:
        assert text.endswith(f"at most --n-prune {max(works)} is possible")
    else:
        assert text.endswith("nothing can be pruned")
