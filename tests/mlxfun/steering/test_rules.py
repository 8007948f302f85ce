"""Steering forces experts into or out of the top-k in every router family."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun.errors import PlanError
from mlxfun.steering import rules as steer
from mlxfun.steering.checks import check
from mlxfun.steering.rules import Steering

TOKENS = [[(5 * i + i * i) % 61 for i in range(40)]]


def routed(r) -> list[tuple[np.ndarray, np.ndarray]]:
    """(experts, weights) [T, K] of each MoE layer."""
    with r.taps.recording() as recording:
        out = r.model(mx.array(TOKENS))
        records = recording.drain()
        mx.eval(out, [a for layer in records for rec in layer for a in rec.arrays()])
    assert np.isfinite(np.array(out.astype(mx.float32))).all()
    result = []
    for layer, (record,) in zip(r.anatomy.layers, records, strict=True):
        inds = np.array(record.indices).reshape(-1, layer.top_k).astype(int)
        weights = np.array(record.weights.astype(mx.float32)).reshape(-1, layer.top_k)
        inds[(weights == 0) & (layer.router_rows > layer.num_experts)] = -1
        result.append((inds, weights))
    return result


def install(r, steering: Steering) -> tuple[str, ...]:
    checked, notices = check(steering, r.resident)
    steer.install(checked, r.resident, r.taps)
    return notices


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_an_activated_expert_serves_every_token_and_a_deactivated_one_none(rig, name):
    r = rig(name)
    before = r.logits(TOKENS)
    up = {layer.index: (5,) for layer in r.anatomy.layers}
    down = {layer.index: (4, 1) for layer in r.anatomy.layers}
    install(r, Steering(up, down))
    for inds, _ in routed(r):
        assert (inds == 5).any(axis=1).all()
        assert not np.isin(inds, (1, 4)).any()
    assert not np.array_equal(np.array(before), np.array(r.logits(TOKENS)))
    install(r, Steering())
    assert np.array_equal(np.array(before), np.array(r.logits(TOKENS)))


@pytest.mark.parametrize("name", tiny_models.GROUPED)
def test_grouped_routers_never_choose_a_deactivated_expert_with_a_large_bias(rig, name):
    """Losing groups are filled with 0.0, which beats live experts of very negative bias."""
    r = rig(name)
    layer = r.anatomy.layers[0]
    if layer.bias_name is None:
        pytest.skip("this grouped router has no selection bias")
    path = f"{layer.bias_owner}.{layer.bias_name}"
    bias = np.full(8, -3.0, dtype=np.float32)
    bias[[1, 6]] = 50.0
    r.resident.tree.put(path, mx.array(bias).astype(r.resident.tree.get(path).dtype))
    assert np.isin(routed(r)[0][0], (1, 6)).any()
    install(r, Steering({}, {layer.index: (1, 6)}))
    assert not np.isin(routed(r)[0][0], (1, 6)).any()


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax", "longcat_flash", "afmoe"])
def test_steering_by_bias_leaves_the_weights_to_the_model(rig, name):
    """The weight of an expert that was selected anyway does not change when another is barred."""
    r = rig(name)
    plain = routed(r)[0]
    never = next(e for e in range(8) if not (plain[0] == e).any(axis=1).all())
    chosen = (plain[0] != never).all(axis=1)
    assert chosen.any()
    install(r, Steering({}, {r.anatomy.layers[0].index: (never,)}))
    steered = routed(r)[0]
    for t in np.flatnonzero(chosen):
        assert dict(zip(*map(tuple, (plain[0][t], plain[1][t])), strict=True)) == dict(
            zip(*map(tuple, (steered[0][t], steered[1][t])), strict=True)
        )


def test_the_rule_on_logits_is_steermoes(rig):
    """Activated: row maximum + 0.01; deactivated: row minimum - 0.01; the others untouched."""
    up, down = np.array([0, 0, 1, 0], bool), np.array([1, 0, 0, 0], bool)
    rule = steer.logits_rule(up, down, steer.MARGIN)
    out = np.array(rule(mx.array([[0.5, 2.0, -1.0, 1.0]])))
    np.testing.assert_allclose(out, [[-1.01, 2.0, 2.01, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_the_rule_keeps_the_dtype_and_never_ties(dtype):
    up = np.array([0, 0, 1], bool)
    rule = steer.logits_rule(up, np.array([1, 0, 0], bool), steer.MARGIN)
    logits = mx.array([[11.0, 12.0, -20.0], [900.0, 1000.0, 3.0]]).astype(dtype)
    out = rule(logits)
    assert out.dtype == dtype
    wide = np.array(out.astype(mx.float32))
    assert (wide[:, 2] > wide[:, 1]).all()
    assert (wide[:, 0] < wide[:, 1]).all()


def test_steering_follows_a_prune_and_its_undo(rig):
    r = rig("qwen3_moe")
    steering = Steering({0: (7,), 1: (7,)})
    install(r, steering)
    undo = r.prune({0: (0, 2, 5, 7), 1: (1, 3, 6, 7)})
    steer.install(steering, r.resident, r.taps)
    for inds, _ in routed(r):
        assert (inds == 7).any(axis=1).all()
    r.resident.swap(undo)
    steer.install(steering, r.resident, r.taps)
    for inds, _ in routed(r):
        assert (inds == 7).any(axis=1).all()


def test_more_activations_than_top_k_are_capped_with_a_notice(rig):
    r = rig("qwen3_moe")
    notices = install(r, Steering({0: (1, 2, 3)}))
    assert notices == ("layer 0: 3 experts activated but each token uses 2; taking [1, 2]",)
    assert all(set(row) == {1, 2} for row in routed(r)[0][0].tolist())


def test_impossible_steering_is_refused_with_the_figures(rig):
    r = rig("qwen3_moe")
    for steering, message in (
        (Steering({9: (1,)}), "decoder layer 9 is not an MoE layer; they are 0..1"),
        (Steering({0: (8,)}), r"layer 0 has no expert 8; they are 0..7"),
        (Steering({0: (1,)}, {0: (1,)}), r"experts \[1\] are both activated and deactivated"),
        (Steering({}, {0: (0, 1, 2, 3, 4, 5, 6)}), "leaves 1, fewer than the 2 .* at most 6"),
    ):
        with pytest.raises(PlanError, match=message):
            check(steering, r.resident)
    grouped = rig("deepseek_v3")
    with pytest.raises(PlanError, match="lie in 2 groups but a token uses 1"):
        check(Steering({1: (0, 7)}), grouped.resident)
    with pytest.raises(PlanError, match=r"the groups hold \[1, 4\] experts"):
        check(Steering({}, {1: (0, 1, 2)}), grouped.resident)


def test_a_newer_wish_replaces_the_opposite_one():
    steering = Steering({1: (2, 3)}, {1: (4,)}).with_more({1: (4,)}, {1: (3,)})
    assert steering.activate == {1: (2, 4)}
    assert steering.deactivate == {1: (3,)}
    assert steering.key != Steering({1: (2, 3)}, {1: (4,)}).key
    assert Steering().key == ""


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_a_large_addition_forces_and_bars_in_every_router(rig, name):
    r = rig(name)
    before = r.logits(TOKENS)
    up = {layer.index: (5,) for layer in r.anatomy.layers}
    down = {layer.index: (4, 1) for layer in r.anatomy.layers}
    install(r, Steering(up, down, "additive", 1e4, -1e9))
    for inds, _ in routed(r):
        assert (inds == 5).any(axis=1).all()
        assert not np.isin(inds, (1, 4)).any()
    install(r, Steering({}, {}, "additive"))
    assert np.array_equal(np.array(before), np.array(r.logits(TOKENS)))


def test_adding_to_logits_routes_as_the_shifted_softmax_does(rig):
    """qwen3_moe renormalises over the top-k: the twin is softmax(logits + b) sorted by hand."""
    r = rig("qwen3_moe")
    with r.taps.recording(logits=True) as recording:
        mx.eval(r.model(mx.array(TOKENS)))
        (plain,) = recording.drain()[0]
    logits = np.array(plain.logits).reshape(-1, 8).astype(np.float64)
    install(r, Steering({0: (6,)}, {0: (2,)}, "additive", 0.75, -0.5))
    inds, weights = routed(r)[0]
    shifted = logits + np.array([0, 0, -0.5, 0, 0, 0, 0.75, 0])
    best = np.argsort(-shifted, axis=1)[:, :2]
    assert [set(row) for row in inds] == [set(row) for row in best]
    for t, row in enumerate(inds):
        odds = np.exp(shifted[t, row])
        np.testing.assert_allclose(weights[t], odds / odds.sum(), rtol=1e-4)
    assert (np.sort(np.argsort(-logits, axis=1)[:, :2]) != np.sort(best)).any(), "it matters"


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax", "glm4_moe"])
def test_adding_to_a_selection_bias_routes_as_a_model_with_that_bias_does(rig, name):
    r = rig(name)
    layer = r.anatomy.layers[0]
    install(r, Steering({layer.index: (6,)}, {layer.index: (2,)}, "additive", 0.05, -0.04))
    steered = routed(r)[0]
    install(r, Steering())
    plain = routed(r)[0]
    path = f"{layer.bias_owner}.{layer.bias_name}"
    own = r.resident.tree.get(path)
    added = mx.array([0, 0, -0.04, 0, 0, 0, 0.05, 0.0])
    r.resident.tree.put(path, own.astype(mx.float32) + added)
    twin = routed(r)[0]
    for got, want in zip(steered, twin, strict=True):
        np.testing.assert_array_equal(np.sort(got), np.sort(want))
    assert (np.sort(plain[0]) != np.sort(steered[0])).any(), "it matters"


def test_an_addition_stays_inside_the_range_of_the_logits():
    nobody = np.zeros(3, dtype=bool)
    rule = steer.rule_of(np.array([0.0, -1e9, 1e9]), nobody, nobody, 0.0)
    out = rule(mx.array([[1.0, 2.0, 3.0]], mx.float16))
    assert out.dtype == mx.float16
    assert np.array(out).tolist() == [[1.0, -65504.0, 65504.0]]


def test_the_rule_is_part_of_what_a_cache_is_valid_for():
    sets = ({1: (2,)}, {})
    keys = {
        Steering(*sets).key,
        Steering(*sets, "additive").key,
        Steering(*sets, "additive", 3.0).key,
        Steering(*sets, "additive", 2.0, -1.0).key,
    }
    assert len(keys) == 4
    assert Steering(*sets, "steermoe", 3.0).key == Steering(*sets).key


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("parts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_the_fused_rule_of_gpus_is_the_plain_one_bit_for_bit(parts, dtype):
    """Slow since on a CPU fusing starts a compiler."""
    rng = np.random.default_rng(3)
    wanted = steer._Wanted(*map(bool, parts), margin=steer.MARGIN)
    arrays = (rng.normal(size=16).astype(np.float32), rng.random(16) < 0.2, rng.random(16) > 0.8)
    given = [mx.array(array) for array, part in zip(arrays, parts, strict=True) if part]
    plain, fused = (steer._rule(wanted, fuse) for fuse in (False, True))
    for shape in ((1, 7, 16), (2, 1, 16)):
        logits = mx.array(9 * rng.normal(size=shape)).astype(dtype)
        out = fused(logits, *given)
        assert out.dtype == dtype
        assert mx.array_equal(out, plain(logits, *given)).item()
