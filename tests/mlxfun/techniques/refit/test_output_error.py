"""Pruning by output error: the router as a formula, and backward elimination, against slow twins."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from merging_rigs import SEQUENCES
from rigs import keep_fewer, make_rig

from mlxfun.data.datasets import batches
from mlxfun.errors import PlanError
from mlxfun.model.router_formula import Routing, Seen
from mlxfun.techniques.refit.layerwise import (
    Candidates,
    Recalibration,
    by_output_error,
    keep_by_output_error,
)
from mlxfun.techniques.refit.output_error import Problem, eliminate, gram_of
from tests.families import spread

WITHOUT_FORMULA = {
    "phimoe": "no formula known",
    "deepseek_v41": "no formula known",
    "longcat_flash": "experts that are no weights",
    "longcat_flash_ngram": "experts that are no weights",
    "dbrx": "are no stack of known",
}
SOME = ("qwen3_moe", "qwen2_moe", "lfm2_moe", "deepseek_v3", "deepseek_v2", "gemma4_text", "llama4")
OTHERS = tuple(n for n in tiny_models.RUNNABLE if n not in (*SOME, *WITHOUT_FORMULA))
FAMILIES = (*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS))


def run(r, choose):
    recalibration = Recalibration(r, follow=False, refit_experts=False)
    return recalibration.run(
        batches(SEQUENCES, 64, 2), lambda tap, seen: choose(recalibration, tap, seen)
    )


def problems(r):
    found = []

    def choose(recalibration, tap, observed):
        found.append((tap, by_output_error(recalibration, r.resident, tap, observed)))
        return tap.live

    run(r, choose)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_formula_foresees_what_the_sliced_router_chooses(rig, name):
    r = rig(name)
    foreseen = {}
    keep = keep_fewer(r.anatomy)

    def foresee(recalibration, tap, observed):
        problem = by_output_error(recalibration, r.resident, tap, observed)
        alive = np.isin(np.arange(tap.layer.num_experts), keep[tap.layer.index])
        foreseen[tap.layer.index] = problem.routing(problem.logits, mx.array(alive))
        return tap.live

    run(r, foresee)
    first = r.resident.layers[0]  # behind it the inputs would differ
    r.prune({**{tap.layer.index: tap.live for tap in r.resident.layers}, **keep})
    seen = []
    run(r, lambda _, tap, observed: seen.append((tap, observed)) or tap.live)
    routed = seen[0][1].routed
    chosen, weights = (np.array(a) for a in foreseen[first.layer.index])
    live = np.array(first.live)
    for t in range(len(chosen)):
        mine = dict(zip(chosen[t].tolist(), weights[t].tolist(), strict=True))
        model = dict(zip(live[routed.chosen[t]].tolist(), routed.weights[t].tolist(), strict=True))
        assert mine == pytest.approx(model, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(("name", "reason"), WITHOUT_FORMULA.items())
def test_a_router_without_a_formula_is_refused_with_the_reason(rig, name, reason):
    with pytest.raises(PlanError, match=reason):
        problems(rig(name))


def naive_error(z, f, alive, top_k, want) -> float:
    """Squared error summed over tokens. z [T, E], f [E, T, D], want [T, D]."""
    total = 0.0
    for t in range(len(z)):
        order = sorted(np.flatnonzero(alive), key=lambda e: -z[t, e])[:top_k]
        weight = np.exp([z[t, e] for e in order])
        weight /= weight.sum()
        out = sum(w * f[e, t] for w, e in zip(weight, order, strict=True))
        total += float(((out - want[t]) ** 2).sum())
    return total


def naive_elimination(z, f, top_k, count, may_go):
    everyone = np.ones(z.shape[1], bool)
    want = np.zeros(f.shape[1:])
    for t in range(len(z)):
        order = sorted(range(z.shape[1]), key=lambda e: -z[t, e])[:top_k]
        weight = np.exp([z[t, e] for e in order])
        want[t] = sum(w * f[e, t] for w, e in zip(weight / weight.sum(), order, strict=True))
    alive, gone, errors = everyone.copy(), [], []
    for _ in range(count):
        trial = {}
        for e in np.flatnonzero(alive & may_go):
            alive[e] = False
            trial[int(e)] = naive_error(z, f, alive, top_k, want)
            alive[e] = True
        best = min(trial, key=trial.get)
        alive[best] = False
        gone.append(best)
        errors.append(trial[best] / float((want**2).sum()))
    return gone, errors


def test_elimination_takes_the_experts_that_a_slow_twin_takes():
    generator = np.random.default_rng(3)
    z, f = generator.normal(size=(60, 6)), generator.normal(size=(6, 60, 5))
    f[4] = f[1] + 0.05 * generator.normal(size=(60, 5))  # two experts that do the same work
    may_go = np.array([True, True, False, True, True, True])
    routing = Routing("softmax", 2)
    logits = mx.array(z.astype(np.float32))
    chosen, weights = routing(logits, mx.ones((6,), dtype=mx.bool_))
    wanted = mx.put_along_axis(mx.zeros((60, 6)), chosen, weights, axis=-1)
    outputs = mx.array(f.astype(np.float32)).swapaxes(0, 1)
    problem = Problem(routing, logits, outputs @ outputs.swapaxes(1, 2), wanted)

    def allowed(gone):
        return may_go & ~np.isin(np.arange(6), gone)

    gone, errors = eliminate(problem, 3, allowed)
    expected, figures = naive_elimination(z, f, 2, 3, may_go)
    assert gone == expected
    assert errors == pytest.approx(figures, rel=1e-4)
    assert (1 in gone) != (4 in gone), "of two twins one stays"
    assert problem.error(np.isin(np.arange(6), gone, invert=True)) == pytest.approx(errors[-1])


def test_products_of_outputs_are_those_of_the_experts_one_by_one(rig):
    r = rig("mixtral")
    found = problems(r)
    recalibration = Recalibration(r, follow=False, refit_experts=False)
    tap, _ = found[0]
    bank = recalibration.bank(tap)
    x = mx.random.normal((5, bank.projection(bank.inward[0]).weight.shape[-1]))
    gram = np.array(gram_of(bank, x))
    experts = bank.experts
    for t in range(5):
        each = [
            np.array(experts(x[t : t + 1], mx.array([[e]]))[0, 0].astype(mx.float32))
            for e in range(8)
        ]
        assert gram[t] == pytest.approx(np.array(each) @ np.array(each).T, rel=1e-4, abs=1e-5)


def test_groups_lose_the_same_number_and_targets_go_first(rig):
    tap, problem = problems(rig("deepseek_v3"))[0]
    groups = tap.layer.n_group
    assert groups > 1
    everyone = np.ones(8, bool)
    first = np.zeros(8, bool)
    first[2] = True
    may_go = everyone.copy()
    may_go[0] = False
    kept = keep_by_output_error(problem, tap.live, groups, Candidates(may_go, first, groups))
    size = 8 // groups
    assert [sum(e // size == g for e in kept) for g in range(groups)] == [size - 1] * groups
    assert 0 in kept
    assert 2 not in kept


def test_a_formula_that_does_not_give_what_was_seen_is_not_taken(rig):
    r = rig("qwen3_moe")
    tap = r.resident.layers[0]
    logits = mx.random.normal((50, 8))
    chosen = np.array(mx.argsort(logits, axis=-1)[:, :2])  # the lowest two: no router does that
    with pytest.raises(PlanError, match="no formula known"):
        Routing.of(tap, r.resident, Seen(logits, chosen, np.full((50, 2), 0.5)))


@pytest.mark.parametrize("name", [*spread(SOME), *FAMILIES[len(SOME) :]])
def test_128_experts_in_bfloat16_tie_and_the_formula_is_still_found(name):
    found = problems(make_rig(*tiny_models.build_many(name)))
    assert len(found) > 0
    for tap, problem in found:
        assert 0 <= problem.error(np.ones(128, bool)) < 0.2, tap.layer.index


def test_a_wrong_formula_is_refused_in_bfloat16_too():
    """A selection bias that the formula is not told of moves experts by more than a rounding."""
    r = make_rig(*tiny_models.build_many("qwen3_moe"))
    logits = mx.random.normal((200, 128), key=mx.random.key(4))
    bias = mx.random.normal((128,), key=mx.random.key(5)) * 0.01
    biased = Routing("softmax", 8, bias=bias)
    chosen, weights = (np.array(a) for a in biased(logits, mx.ones((128,), mx.bool_)))
    seen = Seen(logits, chosen, weights, precision=2**-7)
    with pytest.raises(PlanError, match="no formula known"):
        Routing.of(r.resident.layers[0], r.resident, seen)


@pytest.mark.parametrize(("turned", "taken"), [(1, True), (12, False)])
def test_a_tie_that_went_the_other_way_does_not_refute_a_formula(rig, turned, taken):
    r = rig("qwen3_moe")
    logits = mx.random.normal((100, 8), key=mx.random.key(4))
    chosen, weights = (np.array(a) for a in Routing("softmax", 2)(logits, mx.ones((8,), mx.bool_)))
    for t in range(turned):
        chosen[t, 0] = next(e for e in range(8) if e not in chosen[t])
    seen = Seen(logits, chosen, weights)
    if taken:
        assert Routing.of(r.resident.layers[0], r.resident, seen).normalised
    else:
        with pytest.raises(PlanError, match="no formula known"):
            Routing.of(r.resident.layers[0], r.resident, seen)
