"""On every architecture that mlx-lm has: looking changes nothing, and what is seen is what is used."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from tracing_rigs import TOKENS, bits, classes, tiny

from mlxfun.errors import UsageError
from mlxfun.tracing.interventions import force_route, scale_expert
from mlxfun.tracing.model import Model
from tests.families import spread

ALL = (*tiny_models.RUNNABLE, *tiny_models.RUNNABLE_DENSE)
NO_LAYERS_CALLED = {"iquestloopcoder"}  # its model calls the parts of its layers
SPARSE_COLUMNS = {"deepseek_v41"}  # weights over compressed and chosen keys


def save_all(model: Model) -> dict:
    names = model.dry_run(TOKENS)
    with model.trace(TOKENS) as t:
        return {name: t[name].save() for name in names}


def rebound() -> list[str]:
    modules = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
    return [m.__name__ for m in modules if "_mlxfun_rebound" in vars(m)]


@pytest.mark.parametrize("name", spread(ALL))
def test_saving_everything_changes_no_bit_and_leaves_nothing_behind(name: str) -> None:
    model = tiny(name)
    module = model.parts.model
    before, own = bits(module(mx.array(TOKENS))), classes(module)
    saved = save_all(model)
    assert bits(saved["output"].value) == before
    assert classes(module) == own
    assert not rebound()
    assert bits(module(mx.array(TOKENS))) == before
    expected = {"embed", "output"}
    if name not in NO_LAYERS_CALLED:
        expected |= {"layers.0.input", "layers.0.residual", "layers.1.residual"}
    if model.parts.map.moe is not None:
        moe = model.parts.map.experts.layers[0].index
        expected |= {f"layers.{moe}.router.{part}" for part in ("logits", "choice", "weights")}
        expected |= {f"layers.{moe}.experts.0.output"}
    assert set(saved) >= expected


@pytest.mark.parametrize("name", spread(ALL))
def test_attention_weights_times_values_are_what_the_heads_put_out(name: str) -> None:
    model = tiny(name)
    seen = [n for n in model.dry_run(TOKENS) if n.endswith(".attn.weights")]
    if not seen or name in SPARSE_COLUMNS:
        pytest.skip("no attention weights over positions")
    parts = {n.removesuffix(".weights") for n in seen}
    with model.trace(TOKENS) as t:
        found = {part: (t[f"{part}.weights"].save(), t[f"{part}.heads"].save(),
                        t[f"{part}.values"].save() if f"{part}.values" in model.names() else None)
                 for part in parts}  # fmt: skip
    for weights, heads, values in found.values():
        w = np.array(weights)
        assert (w[..., np.triu(np.ones(w.shape[-2:], bool), 1)] < 1e-6).all()  # none looks ahead
        assert (w.sum(-1) <= 1 + 1e-4).all()
        if values is None:  # gemma2 and olmo multiply by hand
            assert np.allclose(w.sum(-1), 1, atol=1e-4)
            continue
        v = np.repeat(np.array(values), w.shape[1] // values.shape[1], axis=1)
        assert np.allclose(w @ v, np.array(heads), atol=2e-4)


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_what_an_expert_adds_is_what_scaling_it_changes(name: str) -> None:
    model = tiny(name)
    moe = model.parts.map.experts.layers[0]
    block = moe.block
    with model.trace(TOKENS) as t:
        choice = t.layers[moe.index].router.choice.save()
        weights = t.layers[moe.index].router.weights.save()
        before = t[block].save()
    heaviest = int(mx.argmax(weights[0, -1]).item())
    expert = int(choice.value[0, -1, heaviest].item())
    with model.trace(TOKENS) as t:
        adds = t.layers[moe.index].experts[expert].output.save()
    with model.trace(TOKENS) as t:
        t.layers[moe.index].experts = scale_expert(expert, 3.0)
        after = t[block].save()
    change = np.array(after) - np.array(before)
    served = np.zeros(change.shape[:2], bool)
    served[tuple(adds.tokens.T)] = True
    assert served[0, -1]
    assert not change[~served].any()
    assert np.abs(change[served]).max() > 0
    if moe.facts.post_scale is None and moe.block != model.parts.map.layers[moe.index].path:
        expected = np.zeros_like(change)
        np.add.at(expected, tuple(adds.tokens.T), 2 * np.array(adds))
        assert np.allclose(change, expected, atol=1e-4 * max(1, np.abs(np.array(before)).max()))


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_forcing_the_route_that_was_taken_changes_no_bit_and_another_takes_it(name: str) -> None:
    model = tiny(name)
    moe = model.parts.map.experts.layers[0]
    with model.trace([TOKENS[0]]) as t:
        choice = t.layers[moe.index].router.choice.save(positions=-1)
        plain = t.output.save()
    taken = [e for e in choice.value[0].tolist() if e < moe.num_experts]
    other = next(e for e in range(moe.num_experts) if e not in taken)
    if moe.router_rows > moe.num_experts:
        t = model.trace([TOKENS[0]])
        with pytest.raises(UsageError, match="experts that are no weights"), t:
            t.layers[moe.index].router = force_route([other])
        return
    with model.trace([TOKENS[0]]) as t:
        t.layers[moe.index].router = force_route(taken, positions=-1)
        same = t.output.save()
    assert bits(same.value) == bits(plain.value)
    with model.trace([TOKENS[0]]) as t:
        t.layers[moe.index].router = force_route([other], positions=-1)
        now = t.layers[moe.index].router.choice.save(positions=-1)
        served = t.layers[moe.index].experts[other].output.save(positions=-1)
        changed = t.output.save(positions=-1)
    assert other in now.value[0].tolist()
    assert served.tokens.tolist() == [[0, len(TOKENS[0]) - 1]]
    assert bits(changed.value) != bits(plain.value[:, -1])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text"])
@pytest.mark.parametrize("mode", ["affine4", "mxfp4"])
def test_packed_models_are_seen_as_they_are(name: str, mode: str) -> None:
    model = tiny(name, mode)
    before = bits(model.parts.model(mx.array(TOKENS)))
    saved = save_all(model)
    assert bits(saved["output"].value) == before


FUSED = ("bailing_moe", "bailing_moe_linear", "dbrx", "phixtral", "phi3", "gpt2", "gpt_bigcode",
         "gpt_neox", "internlm2", "lille-130m", "openelm", "plamo2", "plamo3", "qwen", "spark2_5")  # fmt: skip
"""Families with one module for queries, keys and values, of which nothing but RoPE and norms follows."""


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_is_taken_apart_as_the_attention_does(name: str) -> None:
    model = tiny(name)
    points = model.parts.names.points
    part = next(n.removesuffix(".v") for n, p in points.items() if n.endswith(".v") and p.columns)
    with model.trace(TOKENS) as t:
        q, k, v = (t[f"{part}.{role}"].save() for role in "qkv")
        seen = [t[f"{part}.{n}"].save() for n in ("queries", "keys", "values")]
    flat = [np.array(one).swapaxes(1, 2).reshape(2, 6, -1) for one in seen]
    assert np.allclose(np.array(v), flat[2], atol=1e-5)
    if f"{part}.q_norm" not in points and name not in ("plamo2", "bailing_moe_linear"):
        # RoPE leaves the first position as it is.
        assert np.allclose(np.array(q)[:, 0], flat[0][:, 0], atol=1e-5)
        assert np.allclose(np.array(k)[:, 0], flat[1][:, 0], atol=1e-5)
    with model.trace(TOKENS) as t:
        t[f"{part}.v"] = 0.0
        zero, kept = t[f"{part}.values"].save(), t[f"{part}.q"].save()
    assert not np.array(zero).any()
    assert np.array_equal(np.array(kept), np.array(q))
