"""Taps see the routing exactly and change nothing, on every architecture."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from rigs import make_rig

from mlxfun.hooks import routers
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.step_routing import FUSED, _join, _join_squares, output_norms
from mlxfun.steering import rules as steer
from mlxfun.steering.rules import Steering

TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]]
VJP = tuple(n for n in tiny_models.RUNNABLE if n not in ("llama4", "dbrx"))


def parameter_names(model) -> list[str]:
    return [name for name, _ in tree_flatten(model.parameters())]


def block_call(rig, layer):
    """The MoE part of a decoder layer as a function of its input."""
    modules = dict(rig.model.named_modules())
    block = modules[layer.block]
    if layer.family == "gemma4_text":  # router and experts sit in the decoder layer itself
        return lambda x: block.experts(x, *block.router(x))
    return block


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_outputs_are_bit_identical_with_and_without_taps(name):
    model, config = tiny_models.build(name)
    plain = model(mx.array(TOKENS))
    mx.eval(plain)
    names = parameter_names(model)
    classes = {path: type(m) for path, m in model.named_modules()}
    r = make_rig(model, config)
    assert parameter_names(model) == names
    with r.taps.recording(logits=True) as recording:
        recorded = r.logits(TOKENS)
        records = recording.drain()
        mx.eval([a for layer in records for rec in layer for a in rec.arrays()])
    assert np.array_equal(np.array(plain), np.array(recorded))
    assert np.array_equal(np.array(plain), np.array(r.logits(TOKENS)))
    for layer, found in zip(r.anatomy.layers, records, strict=True):
        assert len(found) == 1
        assert found[0].indices.shape[-1] == layer.top_k
        assert found[0].weights is not None, "the applied weights were not seen"
        assert found[0].norms.shape == found[0].indices.shape
    r.taps.detach()
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert parameter_names(model) == names
    assert np.array_equal(np.array(plain), np.array(r.logits(TOKENS)))


@pytest.mark.parametrize("name", VJP)
def test_weights_are_those_the_model_applies(rig, name):
    """The gradient of the block with respect to each expert's output is weight x (what follows).

    Without a post-factor what follows is the output's own cotangent; with one (a scale or a
    projection after the sum) it is the same vector for all experts of a token.
    """
    r = rig(name)
    layer = r.anatomy.layers[-1]
    call = block_call(r, layer)
    config = r.config.get("text_config", r.config)
    hidden = config.get("hidden_size") or config["model_dim"]
    mx.random.seed(3)
    x = mx.random.normal((1, 6, hidden))
    with r.taps.recording(positions=[layer.position]) as recording:
        out = call(x)
        ((record,),) = recording.drain()
        mx.eval(out, *record.arrays())
    k = layer.top_k
    weights = record.weights.reshape(-1, k)
    shape = {}

    def with_delta(delta):
        def injected(own, x, indices, *args):
            y = own(x, indices, *args)
            shape["y"] = y.shape
            return y + delta.reshape(y.shape) if delta is not None else y

        hooks = Hooks(dict(r.model.named_modules()))
        hooks.on_call(layer.experts, injected)
        with hooks:
            return call(x)

    mx.eval(with_delta(None))
    cotangent = mx.random.normal(out.shape)
    zero = mx.zeros(shape["y"])
    (_,), (gradient,) = mx.vjp(with_delta, [zero], [cotangent])
    g = np.array(gradient).reshape(-1, k, shape["y"][-1])
    w = np.array(weights.astype(mx.float32))
    if layer.facts.post_scale is None:
        expected = w[..., None] * np.array(cotangent).reshape(-1, 1, hidden)
        np.testing.assert_allclose(g, expected, rtol=2e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(
            g * w[:, :1, None], g[:, :1] * w[..., None], rtol=2e-4, atol=1e-6
        )
    assert (w > 0).any()


@pytest.mark.parametrize("steered", [False, True])
def test_llama4_weights_are_what_multiplies_the_experts_input(rig, steered):
    r = rig("llama4")
    layer = r.anatomy.layers[-1]
    if steered:
        steer.install(Steering({layer.index: (5,)}), r.resident, r.taps)
    modules = dict(r.model.named_modules())
    block = modules[layer.block]
    x = mx.random.normal((1, 5, 32))
    with r.taps.recording(positions=[layer.position]) as recording:
        out = block(x)
        ((record,),) = recording.drain()
    r.taps.detach()
    routed = block.experts(x * record.weights, record.indices).squeeze(2)
    assert np.array_equal(np.array(out), np.array(routed + block.shared_expert(x)))


@pytest.mark.parametrize("steered", [False, True])
def test_dbrx_weights_and_indices_rebuild_its_output(rig, steered):
    r = rig("dbrx")
    layer = r.anatomy.layers[-1]
    if steered:
        steer.install(Steering({layer.index: (5,)}, {layer.index: (2,)}), r.resident, r.taps)
    block = dict(r.model.named_modules())[layer.block]
    x = mx.random.normal((1, 5, 32))
    with r.taps.recording(positions=[layer.position]) as recording:
        out = block(x)
        ((record,),) = recording.drain()
    r.taps.detach()
    w, inds = np.array(record.weights)[0], np.array(record.indices)[0]
    experts = block["experts"]
    rebuilt = [
        sum(w[t, k] * np.array(experts[inds[t, k]](x[0, t])) for k in range(2)) for t in range(5)
    ]
    np.testing.assert_allclose(np.array(out)[0], np.stack(rebuilt), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v3", "gemma4_text", "longcat_flash", "dbrx"]
)
def test_checkpoint_numbers_are_reported_while_a_prune_is_staged(rig, name):
    r = rig(name)
    r.prune(dict.fromkeys(r.anatomy.indices, (2, 3, 6, 7)))
    with r.taps.recording() as recording:
        r.logits(TOKENS)
        records = recording.drain()
    for found in records:
        used = np.array(found[0].indices)[np.array(found[0].weights) != 0]
        assert used.size
        assert set(used.reshape(-1).tolist()) <= {2, 3, 6, 7}  # sliced numbering would be 0..3


def test_nothing_is_evaluated_inside_the_forward(rig, monkeypatch):
    """Every evaluation entry point fails while the tapped forward is being built."""
    r = rig("qwen3_moe")
    tokens = mx.array(TOKENS)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("evaluated inside the forward")

    with r.taps.recording() as recording, monkeypatch.context() as patch:
        for name in ("eval", "async_eval", "synchronize"):
            patch.setattr(mx, name, forbidden)
        out = r.model(tokens)
        records = recording.drain()
    mx.eval(out, records[0][0].norms)


def test_recordings_nest(rig):
    r = rig("qwen3_moe")
    with r.taps.recording(logits=True) as outer:
        with r.taps.recording() as inner:
            r.logits(TOKENS)
        r.logits(TOKENS)
        within, around = inner.drain(), outer.drain()
    assert [len(layer) for layer in within] == [1] * len(r.anatomy.layers)
    assert [len(layer) for layer in around] == [2] * len(r.anatomy.layers)
    for layer in around:
        assert all(record.logits is not None for record in layer)
    assert not any(tap.clients for tap in r.taps.layers)


def test_attaching_twice_and_detaching_once_restores_the_model(rig):
    r = rig("mixtral")
    r.taps.attach()
    r.taps.detach()
    assert not r.taps.attached
    assert all("Tap" not in base.__name__ for m in r.model.modules() for base in type(m).__mro__)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.uint32])
def test_rows_that_one_kernel_joins_are_the_rows_as_they_were(dtype: mx.Dtype) -> None:
    # The kernel itself runs on a GPU only; its function, uncompiled, must move bits and no more.
    rows = [mx.array([1.5 * i, 7 + i, 2**20 + i]).astype(dtype) for i in range(FUSED)]
    joined = _join(*rows)
    assert joined.dtype == dtype
    assert mx.array_equal(joined, mx.stack(rows))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_norms_that_one_kernel_joins_are_those_of_each_layer(dtype: mx.Dtype) -> None:
    outputs = [mx.random.normal((8, 96)).astype(dtype) for _ in range(FUSED)]
    found = mx.sqrt(mx.sum(_join_squares(*outputs), axis=-1))
    assert mx.array_equal(found, output_norms(mx.stack(outputs))).item()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dots1", "phimoe"])
def test_a_sequence_longer_than_the_device_takes_goes_through_the_experts_in_parts(
    monkeypatch, name
):
    model, config = tiny_models.build(name)
    plain = model(mx.array(TOKENS))
    mx.eval(plain)
    sizes: list[int] = []
    split = routers.in_parts

    def noted(run, x, rows, most):
        def part(x, rows):
            sizes.append(rows.size)
            return run(x, rows)

        return split(part, x, rows, most)

    monkeypatch.setattr(routers, "in_parts", noted)
    monkeypatch.setattr(routers, "routed_rows", lambda: 7)
    r = make_rig(model, config)
    with r.taps.recording() as recording:
        logits = r.logits(TOKENS)
        records = recording.drain()
    assert max(sizes) <= 7
    assert sum(sizes) == sum(rec.indices.size for layer in records for rec in layer)
    assert mx.allclose(logits, plain, rtol=1e-4, atol=1e-5).item()
