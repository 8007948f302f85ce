"""Removing a direction as an edit: nothing writes it any more, and undo brings all back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from ablation_rigs import (
    TOKENS,
    flat,
    outputs_of,
    plan_for,
    randomise_norms,
    run_ablation,
    shares,
    unit,
    width_of,
)
from merging_rigs import parameters, run_merge
from rigs import make_rig

from mlxfun.context import Context
from mlxfun.errors import Cancelled, ModelError
from mlxfun.model.anatomy.facts import LEAKS
from mlxfun.model.identity import state_id
from mlxfun.model.outputs import leaks
from mlxfun.model.parameters import dequantised
from mlxfun.model.places import FromCheckpoint
from mlxfun.model.slicing import compact_delta
from mlxfun.techniques.ablate.delta import Projector, ablate_delta, projections
from tests.families import spread


def same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def spare_identity_experts(r) -> None:
    """longcat: never route to an expert that hands on its own input."""
    for tap in r.resident.layers:
        router = r.resident.tree.modules[tap.layer.router]
        bias = np.array(router.e_score_correction_bias)
        bias[tap.layer.num_experts :] = -1e9
        router.e_score_correction_bias = mx.array(bias)


# Not by their layers' projections alone (rwkv7 and talkie leak, gemma3n is refused), or not by
# layers that are called (iquestloopcoder).
OTHERWISE = {"rwkv7", "talkie", "gemma3n", "iquestloopcoder"}
DENSE = tuple(name for name in tiny_models.RUNNABLE_DENSE if name not in OTHERWISE)


@pytest.mark.parametrize("name", spread([*tiny_models.RUNNABLE, *DENSE]))
def test_no_layer_writes_an_ablated_direction_and_undo_is_bitwise(rig, name):
    r = rig(name)
    randomise_norms(r)
    if any(tap.layer.family in LEAKS for tap in r.resident.layers):
        spare_identity_experts(r)
    direction = unit(width_of(r))
    assert max(shares(r, direction)) > 1e-3
    before, weights = r.logits(TOKENS), parameters(r)
    wanted = projections(outputs_of(r), plan_for(r), r.resident)
    projector = Projector(r.resident, outputs_of(r))
    with projector.attached():
        assert same(before, r.logits(TOKENS)), "an empty table changes nothing"
        projector.set(wanted)
        trial = np.array(r.logits(TOKENS))
        assert max(shares(r, direction)) < 2e-6
    assert same(before, r.logits(TOKENS))
    undo = r.resident.swap(run_ablation(r))
    assert max(shares(r, direction)) < 2e-6
    staged = r.logits(TOKENS)
    np.testing.assert_allclose(np.array(staged), trial, atol=3e-4)
    assert same(staged, r.saved_and_reloaded()(mx.array(TOKENS)))
    r.resident.swap(undo)
    after = parameters(r)
    assert all(np.array_equal(weights[p], after[p], equal_nan=True) for p in weights)
    assert same(before, r.logits(TOKENS))
    assert r.resident.ledger == {}
    assert r.resident.made == set()


def test_longcats_identity_experts_hand_the_direction_on(rig):
    r = rig("longcat_flash")
    randomise_norms(r)
    r.resident.swap(run_ablation(r))
    assert max(shares(r, unit(width_of(r)))) > 1e-3, "the warning in LEAKS would be wrong"


@pytest.mark.parametrize("name", ["rwkv7", "talkie"])
def test_what_leaks_is_said_and_does_leak(rig, name):
    r = rig(name)
    r.resident.swap(run_ablation(r))
    assert max(shares(r, unit(width_of(r)))) > 1e-3
    (said,) = leaks(r.resident.tree.modules, r.map)
    assert said.startswith(f"{name}: ")


def test_a_model_that_mixes_streams_is_refused(rig):
    with pytest.raises(ModelError, match="gemma3n cannot be edited: it runs several residual"):
        outputs_of(rig("gemma3n"))


def test_outputs_of_dense_layers_are_those_of_attention_and_mlp(rig):
    found = [(o.path, o.layer, o.position, o.component, o.norms) for o in outputs_of(rig("olmo2"))]
    assert found[2:4] == [
        (
            "model.layers.1.self_attn.o_proj", 1, None, "attention",
            ("model.layers.1.post_attention_layernorm",),
        ),
        (
            "model.layers.1.mlp.down_proj", 1, None, "dense",
            ("model.layers.1.post_feedforward_layernorm",),
        ),
    ]  # fmt: skip
    assert len(found) == 6


EVERY_MODE = ("affine4", "affine8", "mxfp4", "mxfp8", "nvfp4")
QUICK = ("gpt_oss", "nemotron_h")
SPREAD = (
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in tiny_models.RUNNABLE
        if name not in QUICK
    ),
    "llama",
    "gpt2",
)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("name", SPREAD)
def test_quantised_models_stay_in_their_quantisation(rig, name, mode):
    r = rig(name, mode=mode)
    before, weights = r.logits(TOKENS), parameters(r)
    kinds = {p: (r.resident.tree.get(p).dtype, r.resident.tree.get(p).shape) for p in weights}
    direction = unit(width_of(r))
    loud = max(shares(r, direction))
    delta = run_ablation(r)
    edited = {path for layer in delta.layers for path in layer.arrays}
    packed = [path for path in edited if f"{path.rpartition('.')[0]}.scales" in kinds]
    assert packed, "something quantised is edited"
    undo = r.resident.swap(delta)
    assert max(shares(r, direction)) < loud / 2, "what is left is rounding"
    for path, kind in kinds.items():
        array = r.resident.tree.get(path)
        assert (array.dtype, array.shape) == kind, path
    assert same(r.logits(TOKENS), r.saved_and_reloaded()(mx.array(TOKENS)))
    r.resident.swap(r.resident.released(undo))
    assert same(before, r.logits(TOKENS))
    assert all(np.array_equal(weights[p], np.array(r.resident.tree.get(p))) for p in weights)


def naive(weight: np.ndarray, d: np.ndarray, s: float) -> np.ndarray:
    """W - s d (d^T W), one column after the other, in float64."""
    out = weight.astype(np.float64).copy()
    for column in range(out.shape[1]):
        along = sum(d[i] * out[i, column] for i in range(len(d)))
        for i in range(len(d)):
            out[i, column] -= s * d[i] * along
    return out


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.7])
def test_every_part_is_what_the_formula_says(rig, strength):
    r = rig("gpt_oss")  # the one with a bias on every projection
    d = unit(width_of(r))
    base = parameters(r)
    parts = {"attention": {0: strength, 1: strength}, "experts": {1: 2 * strength}}
    r.resident.swap(run_ablation(r, plan_for(r, strengths=parts)))
    now = parameters(r)
    o, down = "model.layers.{}.self_attn.o_proj.{}", "model.layers.{}.mlp.experts.down_proj.{}"
    for layer in (0, 1):
        path = o.format(layer, "weight")
        np.testing.assert_allclose(now[path], naive(base[path], d, strength), atol=2e-6)
        path = o.format(layer, "bias")
        expected = naive(base[path][:, None], d, strength)[:, 0]
        np.testing.assert_allclose(now[path], expected, atol=2e-6)
    for leaf in ("weight", "bias"):
        assert np.array_equal(now[down.format(0, leaf)], base[down.format(0, leaf)])
        for expert in range(8):
            whole = base[down.format(1, leaf)][expert].reshape(len(d), -1)
            expected = naive(whole, d, 2 * strength)
            new = now[down.format(1, leaf)][expert].reshape(len(d), -1)
            np.testing.assert_allclose(new, expected, atol=3e-6)
    changed = {p for p in base if not np.array_equal(base[p], now[p])}
    assert changed == {
        *(o.format(i, leaf) for i in (0, 1) for leaf in ("weight", "bias")),
        *(down.format(1, leaf) for leaf in ("weight", "bias")),
    }


def test_behind_a_norm_the_direction_is_turned_by_its_gain(rig):
    r = rig("afmoe")
    randomise_norms(r)
    d, base = unit(width_of(r)), parameters(r)
    r.resident.swap(run_ablation(r))
    turned = d * base["model.layers.1.post_mlp_layernorm.weight"]
    turned /= np.linalg.norm(turned)
    path = "model.layers.1.mlp.shared_experts.down_proj.weight"
    np.testing.assert_allclose(
        np.array(r.resident.tree.get(path)), naive(base[path], turned, 1.0), atol=2e-6
    )


def test_a_sixteen_bit_model_held_wider_is_rounded_when_edited(rig):
    r = rig("qwen3_moe")
    wanted = projections(outputs_of(r), plan_for(r), r.resident)
    delta = ablate_delta(wanted, r.resident, lambda _: mx.bfloat16)
    for layer in delta.layers:
        for path, array in layer.arrays.items():
            assert array.dtype == r.resident.tree.get(path).dtype == mx.float32
            assert same(array, array.astype(mx.bfloat16).astype(mx.float32)), path


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "nemotron_h", "kimi_k3", "llama4"])
def test_only_the_named_experts_lose_the_direction(rig, name):
    r = rig(name)
    layer = r.anatomy.indices[-1]
    plan = plan_for(r, strengths=flat(r, 1.0, ("experts",)), experts={layer: (2, 5)})
    base, before = parameters(r), r.logits(TOKENS)
    wanted = projections(outputs_of(r), plan, r.resident)
    projector = Projector(r.resident, outputs_of(r))
    with projector.attached():
        projector.set(wanted)
        trial = np.array(r.logits(TOKENS))
    undo = r.resident.swap(run_ablation(r, plan))
    np.testing.assert_allclose(np.array(r.logits(TOKENS)), trial, atol=3e-4)
    now = parameters(r)
    changed = sorted(p for p in base if not np.array_equal(base[p], now[p]))
    if name == "dbrx":
        assert changed == [f"transformer.blocks.1.ffn.experts.{e}.w2.weight" for e in (2, 5)]
    else:
        assert len(changed) == 1
        rows = [e for e in range(8) if not np.array_equal(base[changed[0]][e], now[changed[0]][e])]
        assert rows == [2, 5]
        ids = r.resident.ledger[changed[0]].ids
        assert [i for i, row in enumerate(ids) if isinstance(row, str)] == [2, 5]
    r.resident.swap(undo)
    assert same(before, r.logits(TOKENS))


@pytest.mark.parametrize("name", ["nemotron_h", "kimi_k3"])
def test_a_latent_expert_loses_what_its_way_back_would_make_of_it(rig, name):
    """An expert z in a latent space reaches the stream as U g z: d . U g z' must be 0."""
    r = rig(name)
    randomise_norms(r)
    layer = r.anatomy.layers[0]
    plan = plan_for(r, strengths=flat(r, 1.0, ("experts",)), experts={layer.index: tuple(range(8))})
    r.resident.swap(run_ablation(r, plan))
    stack = next(o for o in outputs_of(r) if o.through is not None)
    modules = r.resident.tree.modules
    back = np.array(modules[stack.through.path].weight, np.float64)
    norm = np.array(modules[stack.norms[0]].weight, np.float64) if stack.norms else 1.0
    seen = unit(width_of(r)) @ back * norm  # what one latent unit adds along d
    for expert in np.array(modules[stack.path].weight, np.float64):
        assert np.abs(seen @ expert).max() < 1e-6 * np.linalg.norm(seen) * np.linalg.norm(expert)


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx"])
def test_an_ablation_of_a_pruned_model_touches_the_living_and_compacts(rig, name):
    r = rig(name)
    states, undos = [r.logits(TOKENS)], []
    keep = dict.fromkeys(r.anatomy.indices, (0, 2, 3, 4, 6, 7))
    undos.append(r.prune(keep))
    states.append(r.logits(TOKENS))
    delta = run_ablation(r)
    undos.append(r.resident.released(r.resident.swap(delta)))
    states.append(r.logits(TOKENS))
    assert same(states[-1], r.saved_and_reloaded()(mx.array(TOKENS)))
    assert max(shares(r, unit(width_of(r)))) < 2e-6
    undos.append(r.resident.swap(compact_delta(r.resident)))
    assert same(states[-1], r.logits(TOKENS))
    assert same(states[-1], r.saved_and_reloaded()(mx.array(TOKENS)))
    other = plan_for(r, direction=tuple(float(v) for v in unit(width_of(r), 3)))
    undos.append(r.resident.released(r.resident.swap(run_ablation(r, other))))
    assert max(shares(r, unit(width_of(r), 3))) < 2e-6
    r.resident.swap(undos.pop())
    assert same(states[-1], r.logits(TOKENS))
    r.resident.swap(undos.pop())
    for undo in reversed(undos):
        assert same(states.pop(), r.logits(TOKENS))
        r.resident.swap(undo)
    assert same(states.pop(), r.logits(TOKENS))
    assert r.resident.ledger == {}


def test_an_ablation_and_a_merge_follow_each_other(rig):
    r = rig("mixtral")
    before = r.logits(TOKENS)
    first = r.resident.released(r.resident.swap(run_ablation(r)))
    ablated = r.logits(TOKENS)
    second = r.resident.released(r.resident.swap(run_merge(r)[1]))
    merged = r.logits(TOKENS)
    other = plan_for(r, direction=tuple(float(v) for v in unit(width_of(r), 3)))
    third = r.resident.released(r.resident.swap(run_ablation(r, other)))
    assert same(r.logits(TOKENS), r.saved_and_reloaded()(mx.array(TOKENS)))
    for undo, expected in ((third, merged), (second, ablated), (first, before)):
        r.resident.swap(undo)
        assert same(r.logits(TOKENS), expected)
    assert (r.resident.ledger, r.resident.made) == ({}, set())


def test_what_apply_releases_is_read_back_and_counts_nothing(rig):
    r = rig("deepseek_v3")  # its first layer has no experts
    delta = run_ablation(r)
    assert [layer.position for layer in delta.layers] == [None, 0]
    sizes = [a.nbytes for layer in delta.layers for a in layer.arrays.values()]
    assert delta.bytes == sum(sizes) > 0
    undo = r.resident.released(r.resident.swap(delta))
    assert undo.bytes == 0
    for layer in undo.layers:
        assert all(source == FromCheckpoint(None) for source in layer.arrays.values())
    redo = r.resident.swap(undo)
    assert redo.bytes == delta.bytes
    again = r.resident.swap(redo)
    assert again.bytes == 0


def test_two_ways_to_the_same_ablation_have_the_same_state(rig):
    states = []
    for strength in (1.0, 1.0, 0.5):
        r = rig("qwen2_moe")
        r.resident.swap(run_ablation(r, plan_for(r, strength)))
        states.append(state_id("x", r.resident.ledger))
    assert states[0] == states[1] != states[2]


def test_a_cancel_between_projections_leaves_the_model(rig):
    class Stop(Context):
        calls = 0

        def check(self) -> None:
            Stop.calls += 1
            if Stop.calls == 3:
                raise Cancelled("cancelled")

    r = rig("qwen3_moe")
    before = r.logits(TOKENS)
    with pytest.raises(Cancelled):
        run_ablation(r, ctx=Stop())
    assert same(before, r.logits(TOKENS))
    assert r.resident.ledger == {}


def test_a_stack_is_unpacked_a_few_rows_at_a_time(rig, monkeypatch):
    r = rig("qwen3_moe", mode="affine4")
    whole = run_ablation(r)
    monkeypatch.setattr("mlxfun.techniques.ablate.delta.ROWS_AT_ONCE", 3 * 64 * 64 * 4)
    parts = run_ablation(r)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.rows == other.rows
        assert all(same(one.arrays[p], other.arrays[p]) for p in one.arrays)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("length", [6, 40])
def test_a_trial_on_a_pruned_model_is_what_is_staged_then(rig, name, length):
    """Stack rows are not expert numbers there; long inputs are sorted by expert."""
    r = rig(name)
    r.prune(dict.fromkeys(r.anatomy.indices, (1, 2, 4, 5, 6, 7)))
    tokens = [[(7 * i + i * i) % 61 for i in range(length)]]
    plan = plan_for(r, 1.5, experts=dict.fromkeys(r.anatomy.indices, (0, 2, 7)))
    before = np.array(r.logits(tokens))
    projector = Projector(r.resident, outputs_of(r))
    with projector.attached():
        projector.set(projections(outputs_of(r), plan, r.resident))
        trial = np.array(r.logits(tokens))
    r.resident.swap(run_ablation(r, plan))
    np.testing.assert_allclose(np.array(r.logits(tokens)), trial, atol=2e-4)
    assert np.abs(before - trial).max() > 1e-2


def test_experts_with_a_scale_of_their_own_keep_one():
    model, config = tiny_models.build("qwen3_moe", wide=True)
    for layer in model.layers:
        experts = layer.mlp.switch_mlp
        experts.down_proj = experts.down_proj.to_quantized(16, 4, "nvfp4", True)
    mx.eval(model.parameters())
    r = make_rig(model, config)
    path = "model.layers.0.mlp.switch_mlp.down_proj"
    before = dequantised(r.resident.tree.modules[path])
    plan = plan_for(r, experts=dict.fromkeys(r.anatomy.indices, (1, 6)), strengths=flat(r, 1.0))
    weights = parameters(r)
    undo = r.resident.swap(run_ablation(r, plan))
    after = dequantised(r.resident.tree.modules[path])
    d = unit(width_of(r))
    for expert in range(8):
        was, now = (np.array(w[expert], np.float64) for w in (before, after))
        if expert in (1, 6):
            assert np.abs(d @ now).max() < 0.2 * np.abs(d @ was).max(), "rounding is left"
        else:
            assert np.array_equal(was, now)
    scales = r.resident.tree.get(f"{path}.global_scale")
    assert (scales.dtype, scales.shape) == (mx.float32, (8,))
    r.resident.swap(undo)
    assert all(np.array_equal(weights[p], np.array(r.resident.tree.get(p))) for p in weights)
