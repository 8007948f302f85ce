"""Similarity, grouping and alignment against slow naive twins written from the formulas."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from merging_rigs import permute_expert
from rigs import keep_fewer

from mlxfun.errors import PlanError
from mlxfun.model.expert_similarity import group_weights, mean_outputs, pseudo_prune, similarity
from mlxfun.model.experts import Bank
from mlxfun.model.parameters import dequantised, requantised
from mlxfun.techniques.merge.alignment import (
    MATCHES,
    costs,
    greedy,
    hungarian,
    unit_activations,
    weight_features,
)
from tests.families import spread

STACKED = tuple(name for name in tiny_models.RUNNABLE if name != "dbrx")


def bank_of(rig, position=0) -> Bank:
    return Bank.of(rig.resident.layers[position], dict(rig.model.named_modules()))


def some_inputs(bank: Bank, tokens: int, seed: int = 0) -> np.ndarray:
    width = bank.weights(bank.inward[0]).shape[-1]
    return np.random.default_rng(seed).standard_normal((tokens, width)).astype(np.float32)


def one_by_one(bank: Bank, x: np.ndarray) -> np.ndarray:
    """Outputs [T, E, D] by the stack's own forward, as the model calls it."""
    rows = np.broadcast_to(np.array(bank.rows, np.uint32), (len(x), len(bank.rows)))
    return np.array(bank.experts(mx.array(x), mx.array(rows)))


# -- the bank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKED)
def test_a_bank_computes_what_the_stack_of_experts_computes(rig, name):
    r = rig(name)
    r.taps.detach()
    bank = bank_of(r)
    x = some_inputs(bank, 5)
    ours = np.array(bank.outputs(bank.activations(mx.array(x)[None])))
    np.testing.assert_allclose(ours.transpose(1, 0, 2), one_by_one(bank, x), rtol=2e-4, atol=2e-5)


def test_a_bank_of_a_pruned_layer_holds_the_live_experts(rig):
    r = rig("qwen3_moe")
    whole = np.array(bank_of(r).weights("up_proj"))
    r.prune(keep_fewer(r.anatomy))
    live = r.resident.layers[0].live
    assert len(live) == 6
    np.testing.assert_array_equal(bank_of(r).weights("up_proj"), whole[list(live)])


def test_experts_in_a_list_are_refused_with_the_reason(rig):
    with pytest.raises(PlanError, match=r"separate modules \(dbrx\), which cannot be merged"):
        bank_of(rig("dbrx"))


# -- similarity -------------------------------------------------------------------------------


def test_mean_outputs_are_means_over_tokens_of_gate_times_output(rig):
    for name in ("qwen3_moe", "gpt_oss", "nemotron_h"):
        r = rig(name)
        r.taps.detach()
        bank = bank_of(r)
        x = some_inputs(bank, 7)
        gates = np.random.default_rng(1).random((7, len(bank.rows))).astype(np.float32)
        slow = one_by_one(bank, x)
        neurons = bank.activations(mx.array(x)[None])
        gated = mean_outputs(bank, neurons, mx.array(gates))
        np.testing.assert_allclose(
            gated, (gates[:, :, None] * slow).mean(0), rtol=1e-4, atol=1e-6, err_msg=name
        )
        plain = mean_outputs(bank, neurons, None)
        np.testing.assert_allclose(plain, slow.mean(0), rtol=1e-4, atol=1e-6, err_msg=name)


def naive_similarity(outputs, logits):
    E = len(outputs)
    cosine, apart = np.zeros((E, E)), np.zeros((E, E))
    for a, b in itertools.product(range(E), repeat=2):
        cosine[a, b] = (
            outputs[a]
            @ outputs[b]
            / (np.sqrt(sum(outputs[a] ** 2)) * np.sqrt(sum(outputs[b] ** 2)))
        )
        za = logits[:, a] / np.sqrt(sum(logits[:, a] ** 2))
        zb = logits[:, b] / np.sqrt(sum(logits[:, b] ** 2))
        apart[a, b] = np.sqrt(sum((za - zb) ** 2))
    return ((1 + cosine) / 2 + (1 - apart / apart.max())) / 2


def test_similarity_follows_its_formula():
    rng = np.random.default_rng(0)
    outputs, logits = rng.standard_normal((6, 9)), rng.standard_normal((11, 6))
    np.testing.assert_allclose(
        similarity(outputs, logits), naive_similarity(outputs, logits), atol=1e-7
    )


def test_equal_experts_are_wholly_alike_and_opposite_ones_not_at_all():
    outputs = np.array([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]])
    logits = np.array([[3.0, 3.0, -3.0]])
    alike = similarity(outputs, logits)
    assert alike[0, 1] == pytest.approx(1.0)
    assert alike[0, 2] == pytest.approx(0.0)


def test_experts_that_put_out_nothing_do_not_make_nan():
    assert np.isfinite(similarity(np.zeros((3, 4)), np.zeros((5, 3)))).all()


# -- groups -----------------------------------------------------------------------------------

ALIKE = np.array(
    [
        [1.0, 0.2, 0.9, 0.8, 0.1],
        [0.2, 1.0, 0.7, 0.3, 0.6],
        [0.9, 0.7, 1.0, 0.5, 0.4],
        [0.8, 0.3, 0.5, 1.0, 0.2],
        [0.1, 0.6, 0.4, 0.2, 1.0],
    ]
)
SALIENCY = np.array([2.0, 5.0, 0.1, 0.2, 0.3])


def test_the_most_salient_centroid_claims_first_and_up_to_its_size():
    assert pseudo_prune(ALIKE, SALIENCY, (0, 1), 16, [0] * 5) == ((0,), (1, 2, 4, 3))
    assert pseudo_prune(ALIKE, SALIENCY, (0, 1), 3, [0] * 5) == ((0, 3), (1, 2, 4))


def test_an_expert_joins_a_centroid_of_its_own_router_group():
    assert pseudo_prune(ALIKE, SALIENCY, (0, 1), 16, [0, 1, 0, 0, 1]) == ((0, 2, 3), (1, 4))


def test_centroids_that_cannot_hold_everybody_are_refused_with_the_figures():
    with pytest.raises(
        PlanError, match=r"--max-group-size 2 lets 2 centroids take 2 of the 3 experts to merge"
    ):
        pseudo_prune(ALIKE, SALIENCY, (0, 1), 2, [0] * 5)


@pytest.mark.parametrize("seed", range(20))
def test_every_expert_ends_in_exactly_one_group(seed):
    rng = np.random.default_rng(seed)
    alike = rng.random((12, 12))
    groups = pseudo_prune(alike, rng.random(12), (1, 4, 7, 10), 4, [0] * 6 + [1] * 6)
    assert sorted(itertools.chain(*groups)) == list(range(12))
    assert tuple(group[0] for group in groups) == (1, 4, 7, 10)
    assert all((e < 6) == (group[0] < 6) for group in groups for e in group)


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        ([3.0, 1.0], [0.75, 0.25]),
        ([3.0, 0.0], [6 / 7, 1 / 7]),  # zero counts as 0.5, less than the smallest
        ([0.2, 0.0, 0.1], [0.5, 0.25, 0.25]),  # zero counts as the smallest
        ([0.0, 0.0], [0.5, 0.5]),
    ],
)
def test_shares_are_normalised_saliencies_with_the_zero_rule(saliency, expected):
    shares = group_weights(np.array(saliency), range(len(saliency)))
    np.testing.assert_allclose(shares, expected)


# -- alignment --------------------------------------------------------------------------------


def naive_cost(bank, x, a, b):
    """|a_i - a_j| + |w_i - w_j| with the full PCA's features where rows are short enough."""
    neurons = np.array(bank.activations(mx.array(x)[None]), np.float64)
    rows = np.concatenate([np.array(bank.weights(n), np.float64) for n in bank.names], axis=-1)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    flat = rows.reshape(-1, rows.shape[-1])
    if flat.shape[1] > 64:
        _, _, vt = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
        rows = (flat - flat.mean(0)) @ vt[:64].T
        rows = rows.reshape(*neurons.shape[::2], 64)
    H = neurons.shape[-1]
    cost = np.zeros((H, H))
    for i, j in itertools.product(range(H), repeat=2):
        ai = neurons[a, :, i] / (np.linalg.norm(neurons[a, :, i]) or 1)
        aj = neurons[b, :, j] / (np.linalg.norm(neurons[b, :, j]) or 1)
        cost[i, j] = np.linalg.norm(ai - aj) + np.linalg.norm(rows[a, i] - rows[b, j])
    return cost


def costs_of(bank, x, pairs):
    neurons = unit_activations(bank.activations(mx.array(x)[None]))
    return list(np.concatenate(list(costs(neurons, weight_features(bank), pairs))))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "phixtral"])
def test_costs_follow_their_formula(rig, name):
    # Rows of at most 64 numbers: nothing is lost to the reduction, and the twin is exact.
    r = rig(name)
    bank = bank_of(r)
    if sum(bank.weights(n).shape[-1] for n in bank.names) > 64:
        r = rig(name, hidden_size=16)
        bank = bank_of(r)
    x = some_inputs(bank, 9)
    for pair, cost in zip([(0, 3), (5, 2)], costs_of(bank, x, [(0, 3), (5, 2)]), strict=True):
        np.testing.assert_allclose(cost, naive_cost(bank, x, *pair), atol=2e-3)


def test_reduced_features_keep_nearly_all_variance_that_full_pca_keeps(rig):
    r = rig("qwen3_moe")
    bank = bank_of(r)
    rng = np.random.default_rng(0)
    # Neurons in 96 dimensions with a decaying spectrum, as trained weights have.
    shape = bank.weights("up_proj").shape
    decay = np.exp(-np.arange(shape[-1]) / 6)
    turn, _ = np.linalg.qr(rng.standard_normal((shape[-1], shape[-1])))
    for name in ("gate_proj", "up_proj"):
        weight = (rng.standard_normal(shape) * decay) @ turn
        bank.projection(name).weight = mx.array(weight.astype(np.float32))
    rows = np.concatenate([np.array(bank.weights(n), np.float64) for n in bank.names], axis=-1)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    flat = rows.reshape(-1, rows.shape[-1])
    values = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    features = np.array(weight_features(bank), np.float64).reshape(len(flat), -1)
    assert features.shape[1] == 64
    assert (features**2).sum() > 0.98 * (values[:64] ** 2).sum()
    gram = features.T @ features  # principal components are uncorrelated
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-3 * gram.max()


def naive_greedy(cost):
    match, used = {}, set()
    for flat in np.argsort(cost, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(cost))
        if i not in match and j not in used:
            match[i] = j
            used.add(j)
    return [match[i] for i in range(len(cost))]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_takes_the_cheapest_pair_left(seed):
    rng = np.random.default_rng(seed)
    cost = rng.random((13, 13)) if seed % 2 else rng.integers(0, 4, (13, 13)).astype(float)
    assert greedy(cost).tolist() == naive_greedy(cost)


@pytest.mark.parametrize("seed", range(5))
def test_hungarian_is_the_cheapest_of_all_matchings(seed):
    cost = np.random.default_rng(seed).random((6, 6))
    best = min(
        itertools.permutations(range(6)), key=lambda p: sum(cost[i, j] for i, j in enumerate(p))
    )
    assert tuple(hungarian(cost)) == best
    assert MATCHES["none"](cost).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", ["hungarian", "greedy"])
@pytest.mark.parametrize("name", spread(STACKED))
def test_a_permuted_copy_of_an_expert_is_matched_neuron_by_neuron(rig, name, how):
    r = rig(name)
    r.taps.detach()
    bank = bank_of(r)
    order = np.random.default_rng(3).permutation(bank.weights(bank.outward).shape[1])
    permute_expert(bank, source=0, target=1, order=order)
    x = some_inputs(bank, 12)
    (cost,) = costs_of(bank, x, [(0, 1)])
    # Neuron order[i] of expert 0 is neuron i of expert 1.
    assert MATCHES[how](cost)[order].tolist() == list(range(len(order)))


# -- quantised weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "group_size", "bits", "global_scale"),
    [
        ("affine", 64, 4, False),
        ("affine", 32, 8, False),
        ("mxfp4", 32, 4, False),
        ("mxfp8", 32, 8, False),
        ("nvfp4", 16, 4, False),
        ("nvfp4", 16, 4, True),
    ],
)
def test_requantising_gives_what_upstream_quantisation_gives(mode, group_size, bits, global_scale):
    from mlx_lm.models.switch_layers import SwitchLinear

    mx.random.seed(0)
    # With a global scale, upstream divides in the dtype of the weights; ours is float32.
    dtype = mx.float32 if global_scale else mx.bfloat16
    plain = SwitchLinear(64, 48, 5, bias=True)
    plain.weight = plain.weight.astype(dtype)
    packed = plain.to_quantized(group_size, bits, mode, global_scale)
    fresh = SwitchLinear(64, 48, 5, bias=False)
    fresh.weight = fresh.weight.astype(dtype)
    expected = fresh.to_quantized(group_size, bits, mode, global_scale)
    new = requantised(packed, fresh.weight.astype(mx.float32), lambda name: packed[name].dtype)
    held = {n for n in ("weight", "scales", "biases", "global_scale") if packed.get(n) is not None}
    assert set(new) == held
    for name, array in new.items():
        assert array.dtype == expected[name].dtype == packed[name].dtype, name
        assert mx.array_equal(array, expected[name]).item(), name
    back = np.array(dequantised(expected, (3, 1)))
    np.testing.assert_allclose(back, np.array(fresh.weight.astype(mx.float32))[[3, 1]], atol=0.05)
