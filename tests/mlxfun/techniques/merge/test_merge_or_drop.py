"""Merges that look at the layer's output: members dropped where that is better, experts refitted."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from merging_rigs import SEQUENCES, run_merge
from rigs import keep_fewer

from mlxfun.data.datasets import batches
from mlxfun.errors import Cancelled
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta
from mlxfun.model.expert_similarity import group_weights
from mlxfun.model.experts import Bank
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.merge.merge_or_drop import choose, merged_output
from mlxfun.techniques.refit import layerwise
from mlxfun.techniques.refit.least_squares import Routed, energy, output
from tests.mlxfun.session.recording import Recorder

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]
STACKED = tuple(name for name in tiny_models.RUNNABLE if name != "dbrx")
QUICK = {("qwen3_moe", None), ("qwen3_moe", "affine4"), ("deepseek_v3", None), ("llama4", None)}
CASES = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
    for name in STACKED
    for mode in (None, *tiny_models.MODES)
]


def first_layer_error(r, delta) -> float:
    """Squared error of the first layer's expert sum with `delta` in place, by the model itself."""
    tap = r.resident.layers[0]

    def put_out() -> mx.array:
        carrier = Carrier(r.model, r.taps, batches(SEQUENCES, 64, 2))
        routed = layerwise.observe(carrier, tap).routed
        return output(Bank.of(tap, dict(r.model.named_modules())), routed)

    wanted = put_out()
    inverse = r.resident.swap(delta)
    try:
        return energy(wanted - put_out()) / energy(wanted)
    finally:
        r.resident.swap(inverse)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_layer_is_served_no_worse_than_by_a_prune_and_saved_as_staged(rig, name, mode):
    r = rig(name, mode=mode)
    before = r.logits(PREFILL)
    _, delta = run_merge(r, auto=True)
    assert mx.array_equal(before, r.logits(PREFILL), equal_nan=True).item()
    tap = r.resident.layers[0]
    keep = keep_fewer(r.anatomy)[tap.layer.index]
    dropped = first_layer_error(r, Delta((prune_layer(r.resident, tap.layer, tap.live, keep),)))
    chosen = first_layer_error(r, Delta(delta.layers[:1]))
    slack = 1e-4 if mode is None else 0.05  # what is chosen is packed anew
    assert chosen <= dropped * (1 + slack) + 1e-6
    undo = r.resident.swap(delta)
    merged = r.logits(PREFILL)
    assert mx.array_equal(merged, r.saved_and_reloaded()(mx.array(PREFILL))).item()
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(PREFILL), equal_nan=True).item()


def test_auto_takes_the_centroids_and_members_that_leave_the_least_error_after_the_refit(rig):
    r = rig("qwen3_moe")
    errors = {}
    for name, options in (
        ("saliency, whole", {}),
        ("auto", {"auto": True}),
    ):
        _, delta = run_merge(r, refit_experts=True, **options)
        errors[name] = first_layer_error(r, Delta(delta.layers[:1]))
    # The centroids that the saliency names here are not the best ones.
    tap = r.resident.layers[0]
    other = tuple(e for e in tap.live if e not in keep_fewer(r.anatomy)[tap.layer.index])
    other = tuple(sorted((*other, *tap.live)[: len(keep_fewer(r.anatomy)[tap.layer.index])]))
    plan, delta = run_merge(r, by_error=lambda *_: other, auto=True, refit_experts=True)
    errors["given both"] = first_layer_error(r, Delta(delta.layers[:1]))
    assert errors["auto"] <= errors["saliency, whole"] * (1 + 1e-4)
    assert errors["given both"] <= errors["auto"] * (1 + 1e-4)
    assert any("are merged" in w or "is merged" in w for w in plan.warnings)


def test_what_moves_text_that_was_kept_back_least_is_taken_where_there_is_any(rig):
    """Counting down, the last candidate is always the best so far; counting up, the first."""
    r = rig("qwen3_moe")
    other = {
        i: tuple(sorted((*keep[1:], min(set(range(8)) - set(keep)))))
        for i, keep in keep_fewer(r.anatomy).items()
    }

    def chosen(step: int):
        calls: list[int] = []

        def moved() -> float:
            calls.append(step * len(calls))
            return float(calls[-1])

        by_error = lambda again, moe, *_: other[moe.layer.index]  # noqa: E731
        plan, _ = run_merge(r, by_error=by_error, auto=True, moved=moved)
        assert len(calls) >= 2 * len(r.anatomy.indices)
        return {index: tuple(groups) for index, groups in plan.groups.items()}

    before = r.logits(PREFILL)
    assert chosen(-1) == other
    assert chosen(1) == keep_fewer(r.anatomy)
    assert mx.array_equal(before, r.logits(PREFILL), equal_nan=True).item()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_refit_makes_up_for_what_merging_loses_and_is_saved_as_staged(rig, name, mode):
    r = rig(name, mode=mode)
    before = r.logits(PREFILL)
    _, plain = run_merge(r)
    again, delta = run_merge(r, refit_experts=True)
    assert mx.array_equal(before, r.logits(PREFILL), equal_nan=True).item()
    assert "refitted" in again.strategy
    assert any("refitted" in warning for warning in again.warnings)
    merged, refitted = (first_layer_error(r, Delta(d.layers[:1])) for d in (plain, delta))
    assert refitted <= merged * (1 + 1e-4)
    if (name, mode) in QUICK:
        assert refitted < 0.9 * merged
    undo = r.resident.swap(delta)
    live = r.logits(PREFILL)
    assert mx.array_equal(live, r.saved_and_reloaded()(mx.array(PREFILL))).item()
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(PREFILL), equal_nan=True).item()


def invented(r):
    """(bank of two centroids, routing, weights of experts 0..3) with outputs known by hand."""
    tap = r.resident.layers[0]
    bank = Bank.of(tap, dict(r.model.named_modules()))
    names = (*bank.inward, bank.outward)
    weights = {
        e: {n: bank.weights(n, [e])[0] for n in names} for e in range(4)
    }  # fmt: skip
    alone = Bank(bank.experts, bank.path, (0, 1), bank.inward, bank.outward)
    x = mx.random.normal((30, 32))
    chosen = np.stack([np.arange(30) % 2, np.full(30, -1)], axis=1)
    return alone, Routed(x, chosen, np.full((30, 2), 0.5, np.float32)), weights


def mean_of(weights):
    """Equal shares; of a member's share a fraction, and what it does not take is the centroid's."""

    def mixed(fractions):
        members = list(fractions)
        share = {e: f / len(members) for e, f in fractions.items()}
        share[members[0]] = 1 - sum(share[e] for e in members[1:])
        return {n: sum(share[e] * weights[e][n] for e in members) for n in weights[members[0]]}

    return mixed


def test_a_member_is_taken_in_exactly_where_the_rest_becomes_smaller(rig):
    alone, routed, weights = invented(rig("qwen3_moe"))
    mixed = mean_of(weights)
    wanted = np.array(output(alone, routed))
    # Tokens of the first centroid want what the mean with expert 2 puts out, the others their own.
    index = np.arange(0, 30, 2)
    x = routed.inputs[mx.array(index.astype(np.uint32))]
    for fraction in (1.0, 0.25):
        arrays = mixed({0: 1.0, 2: fraction})
        wanted[index] = 0.5 * np.array(merged_output(alone, x, arrays))
        rest = mx.array(wanted) - output(alone, routed)
        found = choose(alone, routed, rest, [(0, 2), (1, 3)], mixed)
        assert found.groups == [(0, 2), (1,)]
        assert found.fractions == {0: 1.0, 2: fraction, 1: 1.0}
        assert energy(found.rest) == pytest.approx(0.0, abs=1e-6)


def test_the_share_that_a_member_does_not_take_falls_to_its_centroid():
    saliency = np.array([3.0, 0.5, 1.0])
    whole = group_weights(saliency, (0, 2))
    part = group_weights(saliency, (0, 2), {0: 1.0, 2: 0.5})
    assert whole.tolist() == [0.75, 0.25]
    assert part.tolist() == [0.875, 0.125]


def test_a_cancel_is_seen_between_groups(rig):
    alone, routed, weights = invented(rig("qwen3_moe"))
    rest = mx.random.normal((30, 32))
    with pytest.raises(Cancelled):
        choose(alone, routed, rest, [(0, 2), (1, 3)], mean_of(weights), Recorder(stop_after=1))


def test_a_centroid_that_no_token_uses_takes_nobody_in(rig):
    alone, routed, weights = invented(rig("qwen3_moe"))
    none = Routed(routed.inputs, np.where(routed.chosen == 1, -1, routed.chosen), routed.weights)
    rest = mx.random.normal((30, 32))
    assert choose(alone, none, rest, [(0,), (1, 3)], mean_of(weights)).groups == [(0,), (1,)]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_an_expert_given_as_arrays_puts_out_what_the_stack_does(rig, name):
    r = rig(name)
    alone, routed, weights = invented(r)
    got = merged_output(alone, routed.inputs[:5], weights[1])
    stack = alone.experts(routed.inputs[:5], mx.full((5, 1), 1, dtype=mx.uint32))[:, 0]
    assert np.array(got) == pytest.approx(np.array(stack), rel=1e-4, abs=1e-5)
