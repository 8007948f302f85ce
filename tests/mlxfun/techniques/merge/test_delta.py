"""A merge as an edit: staged, saved and reloaded agree bit for bit, and undo brings all back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import scipy.optimize
import tiny_models
from merging_rigs import SEQUENCES, parameters, permute_expert, run_merge
from mlx.utils import tree_flatten
from rigs import keep_fewer

from mlxfun.context import Context
from mlxfun.errors import Cancelled
from mlxfun.model.delta import Delta
from mlxfun.model.experts import Bank
from mlxfun.model.identity import state_id
from mlxfun.model.places import FromCheckpoint
from mlxfun.model.slicing import compact_delta
from tests.families import spread

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]
MODES = tuple(tiny_models.MODES)
STACKED = tuple(name for name in tiny_models.RUNNABLE if name != "dbrx")


def same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def check_round_trip(r) -> None:
    before, weights = r.logits(PREFILL), parameters(r)
    plan, delta = run_merge(r)
    assert same(before, r.logits(PREFILL)), "planning leaves the model as it was"
    assert r.resident.ledger == {}
    undo = r.resident.swap(delta)
    merged = r.logits(PREFILL)
    assert not same(before, merged)
    assert plan.keep == keep_fewer(r.anatomy)
    assert same(merged, r.saved_and_reloaded()(mx.array(PREFILL)))
    redo = r.resident.swap(r.resident.released(undo))
    assert same(before, r.logits(PREFILL))
    assert r.resident.ledger == {}
    assert r.resident.made == set()
    after = parameters(r)
    assert all(np.array_equal(weights[p], after[p], equal_nan=True) for p in weights)
    undo = r.resident.swap(redo)
    assert same(merged, r.logits(PREFILL))
    r.resident.swap(undo)
    assert same(before, r.logits(PREFILL))


@pytest.mark.parametrize("name", spread(STACKED))
def test_staged_saved_and_undone_merges_agree_bit_for_bit(rig, name):
    check_round_trip(rig(name))


# Every family in one quantisation, and in the others among the slow tests.
QUANTISED = [
    *spread((name, MODES[i % len(MODES)]) for i, name in enumerate(STACKED)),
    *(
        pytest.param(name, mode, marks=pytest.mark.slow)
        for i, name in enumerate(STACKED)
        for j, mode in enumerate(MODES)
        if j != i % len(MODES)
    ),
]


@pytest.mark.parametrize(("name", "mode"), QUANTISED)
def test_quantised_models_stay_in_their_quantisation_bit_for_bit(rig, name, mode):
    r = rig(name, mode=mode)
    before = {p: (a.dtype, a.shape) for p, a in tree_flatten(r.model.parameters())}
    check_round_trip(r)
    undo = r.resident.swap(run_merge(r)[1])
    for path, array in tree_flatten(r.model.parameters()):
        dtype, shape = before[path]
        assert array.dtype == dtype, path
        assert array.shape[1:] == shape[1:], path
    packed = [p.path for p in r.anatomy.layers[0].expert_parameters() if p.path.endswith("scales")]
    assert packed, "the experts are quantised"
    r.resident.swap(undo)


def test_the_stacks_hold_the_centroids_alone_and_weigh_what_arithmetic_says(rig):
    r = rig("qwen3_moe")
    sizes = {p.path: r.resident.tree.get(p.path).nbytes for p in expert_parameters(r)}
    _, delta = run_merge(r)
    r.resident.swap(delta)
    for path, size in sizes.items():
        assert r.resident.tree.get(path).nbytes == size * 6 // 8
    routers = sum(
        delta.layers[i].arrays[p.path].nbytes
        for i, layer in enumerate(r.anatomy.layers)
        for p in layer.router_parameters()
    )
    assert delta.bytes == sum(sizes.values()) * 6 // 8 + routers


def expert_parameters(r):
    return [p for layer in r.anatomy.layers for p in layer.expert_parameters()]


def test_a_released_undo_holds_no_stack_and_reads_it_from_the_checkpoint(rig):
    r = rig("qwen3_moe")
    undo = r.resident.released(r.resident.swap(run_merge(r)[1]))
    stacks = {p.path for p in expert_parameters(r)}
    for layer in undo.layers:
        for path, source in layer.arrays.items():
            if path in stacks:
                assert source == FromCheckpoint(None)
    assert undo.bytes == 0
    redo = r.resident.swap(undo)
    held = sum(a.nbytes for layer in redo.layers for p, a in layer.arrays.items() if p in stacks)
    assert 0 < held <= redo.bytes


def test_an_expert_that_nobody_joined_keeps_its_bytes_and_its_identity(rig):
    r = rig("qwen3_moe")
    plan, delta = run_merge(r)
    alone = [c for c, members in plan.groups[0].items() if len(members) == 1]
    joined = [c for c, members in plan.groups[0].items() if len(members) > 1]
    assert alone
    assert joined
    path = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    base = np.array(r.resident.tree.get(path))
    r.resident.swap(delta)
    new, live = np.array(r.resident.tree.get(path)), r.resident.layers[0].live
    ids = r.resident.ledger[path].ids
    for expert in alone:
        assert np.array_equal(new[live.index(expert)], base[expert])
        assert ids[live.index(expert)] == expert
    for expert in joined:
        assert not np.array_equal(new[live.index(expert)], base[expert])
        assert isinstance(ids[live.index(expert)], str)


def test_two_ways_to_the_same_merge_have_the_same_state(rig):
    states = []
    for _ in range(2):
        r = rig("mixtral")
        r.resident.swap(run_merge(r)[1])
        states.append(state_id("x", r.resident.ledger))
    r = rig("mixtral")
    r.resident.swap(run_merge(r, alignment="none")[1])
    assert states[0] == states[1] != state_id("x", r.resident.ledger)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_permuted_copies_merge_back_to_the_expert_up_to_rounding(rig, name):
    r = rig(name)
    r.taps.detach()
    layer, modules = r.anatomy.layers[0], dict(r.model.named_modules())
    bank = Bank.of(r.resident.layers[0], modules)
    rng = np.random.default_rng(5)
    neurons = bank.weights(bank.outward).shape[1]
    for copy in range(1, layer.num_experts):
        permute_expert(bank, 0, copy, rng.permutation(neurons))
    original = {n: np.array(bank.projection(n).weight[0]) for n in bank.names}
    r.taps.attach()
    keep = dict.fromkeys(r.anatomy.indices, (0, 4))
    plan, delta = run_merge(r, keep)
    assert max(map(len, plan.groups[layer.index].values())) >= 4  # 7 without router groups
    r.resident.swap(delta)
    for name_, weight in original.items():
        new = np.array(bank.projection(name_).weight)
        # Both centroids are the expert; the first in its own order of neurons.
        np.testing.assert_allclose(new[0], weight, atol=2e-6)
        if name_ in bank.inward:
            np.testing.assert_allclose(np.sort(new[1], 0), np.sort(weight, 0), atol=2e-6)


def test_without_alignment_permuted_copies_do_not_merge_back(rig):
    r = rig("qwen3_moe")
    bank = Bank.of(r.resident.layers[0], dict(r.model.named_modules()))
    for copy in range(1, 8):
        permute_expert(bank, 0, copy, np.random.default_rng(copy).permutation(32))
    before = np.array(bank.projection("up_proj").weight)
    plan, delta = run_merge(r, dict.fromkeys(r.anatomy.indices, (0, 4)), alignment="none")
    r.resident.swap(delta)
    joined = max(plan.groups[0], key=lambda c: len(plan.groups[0][c]))
    after = np.array(bank.projection("up_proj").weight[(0, 4).index(joined)])
    assert np.abs(after - before[joined]).max() > 0.01


def test_a_merge_continues_a_prune_and_is_pruned_compacted_and_undone(rig):
    r = rig("qwen3_moe")
    states, undos = [r.logits(PREFILL)], []
    undos.append(r.prune(dict.fromkeys(r.anatomy.indices, (0, 1, 2, 4, 5, 6, 7))))
    states.append(r.logits(PREFILL))
    _, delta = run_merge(r, dict.fromkeys(r.anatomy.indices, (0, 2, 4, 5, 7)))
    undos.append(r.resident.released(r.resident.swap(delta)))
    states.append(r.logits(PREFILL))
    # Only experts that nobody joined may be left: what goes was made by an edit all the same.
    undos.append(r.prune(dict.fromkeys(r.anatomy.indices, (0, 4, 7))))
    states.append(r.logits(PREFILL))
    undos.append(r.resident.swap(compact_delta(r.resident)))
    assert same(states[-1], r.logits(PREFILL))
    r.resident.swap(undos.pop())
    for undo in reversed(undos):
        assert same(states.pop(), r.logits(PREFILL))
        r.resident.swap(undo)
    assert same(states.pop(), r.logits(PREFILL))
    assert r.resident.ledger == {}


def test_a_merged_model_merges_again(rig):
    r = rig("mixtral")
    r.resident.swap(run_merge(r)[1])
    keep = {i: tap.live[:3] for i, tap in zip(r.anatomy.indices, r.resident.layers, strict=True)}
    plan, delta = run_merge(r, keep)
    r.resident.swap(delta)
    assert plan.keep == keep
    assert same(r.logits(PREFILL), r.saved_and_reloaded()(mx.array(PREFILL)))


class StopAt(Context):
    """Cancels at the n-th check."""

    def __init__(self, left: int) -> None:
        self.left, self.labels = left, []

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("cancelled")

    def progress(self, label, done, total=None, unit="") -> None:
        self.labels.append((label, done))


def test_a_cancel_at_any_moment_leaves_the_model_as_it_was(rig):
    r = rig("qwen3_moe")
    before, weights = r.logits(PREFILL), parameters(r)
    reached = set()
    for checks in range(40):
        ctx = StopAt(checks)
        try:
            run_merge(r, ctx=ctx)
        except Cancelled:
            pass
        else:
            break
        reached |= set(ctx.labels)
        assert same(before, r.logits(PREFILL))
        assert r.resident.ledger == {}
        assert r.resident.layers[0].live == tuple(range(8))
    else:
        pytest.fail("the merge never ended")
    assert ("merging", 1) in reached, "some cancel fell after the first layer was swapped in"
    assert all(np.array_equal(weights[p], a) for p, a in parameters(r).items())


def test_later_layers_are_merged_on_what_the_merged_ones_put_out(rig):
    """Twin: keep layer 0 merged, and merge layer 1 alone."""
    everybody, keep = tuple(range(8)), {0: (0, 1, 2, 4, 5, 6), 1: (0, 2, 3, 4, 5, 7)}
    whole, delta = run_merge(rig("qwen3_moe"), keep)
    unmerged, _ = run_merge(rig("qwen3_moe"), {**keep, 0: everybody})
    r = rig("qwen3_moe")
    r.resident.swap(Delta(delta.layers[:1]))
    second, _ = run_merge(r, keep)
    assert second.groups[0] == {e: (e,) for e in keep[0]}
    assert second.weights[1] == whole.weights[1] != unmerged.weights[1]
    assert second.groups[1] == whole.groups[1]


def silu(x):
    return x / (1 + np.exp(-x))


def naive_layer(r, keep, most):
    """REAM on the first layer of a Qwen3-MoE, written down from the formulas in float64.

    Returns saliencies [E], {centroid: members}, and what naive_weights returns.
    """
    experts = r.model.layers[0].mlp.switch_mlp
    gate, up, down = (
        np.array(experts[n].weight, np.float64) for n in ("gate_proj", "up_proj", "down_proj")
    )
    router = np.array(r.model.layers[0].mlp.gate.weight, np.float64)
    xs = []
    for sequence in SEQUENCES:
        with r.taps.recording(inputs=True) as recording:
            r.model(mx.array(sequence[None]))
            xs.append(np.array(recording.drain()[0][0].inputs, np.float64)[0])
    # Tokens in the order in which batches hold them: the two shortest sequences together.
    x = np.concatenate(xs)
    T, E = len(x), len(router)
    logits = x @ router.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    neurons = np.stack([silu(x @ gate[e].T) * (x @ up[e].T) for e in range(E)])
    f = np.stack([neurons[e] @ down[e].T for e in range(E)])
    # Saliency: mean of g |f| over the tokens routed to an expert.
    total, count = np.zeros(E), np.zeros(E)
    for t in range(T):
        top = np.argsort(-p[t])[:2]
        for e in top:
            total[e] += p[t, e] / p[t, top].sum() * np.linalg.norm(f[e, t])
            count[e] += 1
    saliency = np.array([total[e] / count[e] if count[e] else 0.0 for e in range(E)])
    u = np.stack([np.mean([p[t, e] * f[e, t] for t in range(T)], axis=0) for e in range(E)])
    z = logits / np.linalg.norm(logits, axis=0)
    apart = np.array([[np.linalg.norm(z[:, a] - z[:, b]) for b in range(E)] for a in range(E)])
    cosine = np.array(
        [[u[a] @ u[b] / np.linalg.norm(u[a]) / np.linalg.norm(u[b]) for b in range(E)]
         for a in range(E)]
    )  # fmt: skip
    alike = ((1 + cosine) / 2 + 1 - apart / apart.max()) / 2
    free, groups = set(range(E)) - set(keep), {}
    for c in sorted(keep, key=lambda e: -saliency[e]):
        claimed = sorted(free, key=lambda e: -alike[c, e])[: most - 1]
        groups[c] = (c, *claimed)
        free -= set(claimed)
    return saliency, groups, naive_weights((gate, up, down), neurons, saliency, groups)


def naive_weights(weights, neurons, saliency, groups):
    """Shares, and the aligned weighted means of the up and down projections."""
    gate, up, down = weights
    rows = np.concatenate([gate, up, down.swapaxes(1, 2)], axis=2)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    shares, new_up, new_down = {}, [], []
    for c in sorted(groups):
        members = groups[c]
        weight = saliency[list(members)]
        weight = weight / weight.sum()
        shares |= dict(zip(members, weight, strict=True))
        u_sum, d_sum = np.zeros_like(up[c]), np.zeros_like(down[c])
        for e, share in zip(members, weight, strict=True):
            a = neurons[c] / np.linalg.norm(neurons[c], axis=0)
            b = neurons[e] / np.linalg.norm(neurons[e], axis=0)
            H = a.shape[1]
            cost = np.array(
                [[np.linalg.norm(a[:, i] - b[:, j]) + np.linalg.norm(rows[c, i] - rows[e, j])
                  for j in range(H)] for i in range(H)]
            )  # fmt: skip
            match = scipy.optimize.linear_sum_assignment(cost)[1] if e != c else np.arange(H)
            for i in range(H):
                u_sum[i] += share * up[e][match[i]]
                d_sum[:, i] += share * down[e][:, match[i]]
        new_up.append(u_sum)
        new_down.append(d_sum)
    return shares, np.stack(new_up), np.stack(new_down)


@pytest.mark.parametrize("most", [16, 3])
def test_a_merged_layer_is_what_the_formulas_say(rig, most):
    r = rig("qwen3_moe", hidden_size=16, norm_topk_prob=True)
    keep = (0, 2, 3, 6)
    _, groups, (shares, up, down) = naive_layer(r, keep, most)
    assert max(map(len, groups.values())) > 2
    everywhere = dict.fromkeys(r.anatomy.indices, keep)
    plan, delta = run_merge(r, everywhere, max_group_size=most, metric="reap")
    assert {c: set(m) for c, m in plan.groups[0].items()} == {c: set(groups[c]) for c in keep}
    for expert, share in shares.items():
        assert plan.weights[0][expert] == pytest.approx(share, rel=1e-4)
    r.resident.swap(delta)
    experts = r.model.layers[0].mlp.switch_mlp
    np.testing.assert_allclose(np.array(experts.up_proj.weight), up, atol=1e-5)
    np.testing.assert_allclose(np.array(experts.down_proj.weight), down, atol=1e-5)
    gate = r.model.layers[0].mlp.gate.weight
    assert gate.shape == (4, 16), "a centroid keeps its router row"
