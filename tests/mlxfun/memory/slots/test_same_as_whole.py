"""A model with some of its experts in slots says what the whole model says, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from slot_rigs import (
    FAMILIES,
    PROMPT,
    Slotted,
    continued,
    logits,
    on_disk,
    unstacked,
    whole_model,
)

from mlxfun.model.parameters import flatten
from tests.families import spread

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 40)).tolist()
"""Enough choices for mlx-lm to sort them, and for every expert to be wanted at once."""

PACKINGS = {
    **{
        f"affine{bits}": {"group_size": 32, "bits": bits, "mode": "affine"} for bits in (2, 3, 5, 6)
    },
    **tiny_models.MODES,
    **tiny_models.MORE_MODES,
}


def packed(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype = mx.bfloat16
) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(tiny_models, "MODES", PACKINGS)
    model, config = tiny_models.build(name, wide=True)
    model.set_dtype(dtype)
    return model, tiny_models.quantise(model, config, mode)


def wide(array: mx.array) -> mx.array:
    """NumPy has no bfloat16."""
    return array.astype(mx.float32) if array.dtype == mx.bfloat16 else array


def require_same(path: Path, budgets: tuple[int, ...], count: int) -> None:
    whole = whole_model(path)
    expected, answer = logits(whole, TOKENS), continued(whole, PROMPT, count)
    # Not the rows of `expected` turned round: OpenBLAS rounds by a row's place in the batch.
    turned = logits(whole, TOKENS[::-1])
    assert np.isfinite(expected).all()
    held = {path: wide(array) for path, array in flatten(whole.parameters())}
    for slots in budgets:
        some = Slotted.open(path, slots)
        assert np.array_equal(logits(some.model, TOKENS), expected), slots
        assert continued(some.model, PROMPT, count) == answer, slots
        assert np.array_equal(logits(some.model, TOKENS[::-1]), turned), slots
        for name in some.partly.sources[-1].held:  # what a save writes
            stack, own = some.slots.aside[name].lazy(), held[name]
            assert np.array_equal(np.array(stack.astype(own.dtype)), np.array(own)), name
        assert some.evictions > 0 or slots > 4  # or nothing was tested
        some.close()


@pytest.mark.parametrize("name", spread(FAMILIES))
def test_every_family(name: str, tmp_path: Path) -> None:
    """Of 8 experts 2 and 6 are held: as many as a token uses (and a quarter), and three quarters."""
    model, config = tiny_models.build(name)
    require_same(on_disk(tmp_path, model, config), (2, 6), 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_over_64_tokens(name: str, tmp_path: Path) -> None:
    """A quarter, a half and three quarters, and 3, one more than a token uses."""
    model, config = tiny_models.build(name)
    require_same(on_disk(tmp_path, model, config), (2, 3, 4, 6), 64)


SOME = {
    "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "gemma4", "llama4", "longcat_flash",
    "qwen3_next",
}  # fmt: skip
"""Families whose blocks differ most; the others run with the slow tests."""


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_every_family_in_4_bits_and_shards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = packed(name, "affine4", monkeypatch)
    require_same(on_disk(tmp_path, model, config, shards=3), (3,), 4)


@pytest.mark.parametrize("mode", [mode for mode in PACKINGS if mode != "affine4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_every_packing(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU packed weights take ten times as long with bfloat16: one family has both.
    dtype = mx.bfloat16 if name == "qwen3_moe" else mx.float32
    model, config = packed(name, mode, monkeypatch, dtype)
    require_same(on_disk(tmp_path, model, config), (3,), 8)


def test_half_precision_is_widened_as_a_whole_model_is(tmp_path: Path) -> None:
    model, config = tiny_models.build("qwen3_moe")
    model.set_dtype(mx.bfloat16)
    require_same(on_disk(tmp_path, model, config), (2, 4), 16)


def test_one_slot_a_layer_where_a_token_uses_one(tmp_path: Path) -> None:
    model, config = tiny_models.build("llama4")
    require_same(on_disk(tmp_path, model, config), (1, 6), 16)


HUB = {
    "qwen3_moe": {"mlp.switch_mlp.": "mlp.experts.{e}."},
    "deepseek_v3": {"mlp.switch_mlp.": "mlp.experts.{e}."},
    "olmoe": {"mlp.switch_mlp.": "mlp.experts.{e}."},
    "mixtral": {
        f"block_sparse_moe.switch_mlp.{ours}.": f"block_sparse_moe.experts.{{e}}.{theirs}."
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
    },
}


@pytest.mark.parametrize("name", HUB)
def test_experts_that_the_hub_stores_one_by_one(name: str, tmp_path: Path) -> None:
    model, config = tiny_models.build(name)
    path = unstacked(on_disk(tmp_path, model, config), HUB[name])
    require_same(path, (3,), 16)


def test_packed_experts_that_are_stored_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = packed("mixtral", "affine4", monkeypatch)
    require_same(unstacked(on_disk(tmp_path, model, config), HUB["mixtral"]), (3,), 16)


def rewritten(path: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Path:
    """The checkpoint with other tensors."""
    (file,) = path.glob("model*.safetensors")
    arrays = dict(mx.load(str(file)))  # type: ignore[call-overload]
    mx.eval(arrays)
    mx.save_safetensors(str(file), change(arrays))
    return path


def fused(arrays: dict[str, mx.array], join: Callable[..., mx.array]) -> dict[str, mx.array]:
    """Gate and up projections as one, under the Hub's name."""
    made = dict(arrays)
    for name in arrays:
        if "gate_proj" in name and ("switch_mlp" in name or ".experts." in name):
            gate, up = made.pop(name), made.pop(name.replace("gate_proj", "up_proj"))
            made[name.replace("gate_proj", "gate_up_proj")] = join(gate, up)
    return made


def test_stacks_that_are_fused_on_the_hub(tmp_path: Path) -> None:
    """Qwen3.5: gate above up, in one."""

    def as_on_the_hub(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        joined = fused(arrays, lambda gate, up: mx.concatenate([gate, up], axis=-2))
        return {
            name.replace("mlp.switch_mlp.", "mlp.experts.").removesuffix(".weight")
            if "switch_mlp" in name
            else name: array
            for name, array in joined.items()
        }

    model, config = tiny_models.build("qwen3_5_moe")
    require_same(rewritten(on_disk(tmp_path, model, config), as_on_the_hub), (3,), 16)


def test_stacks_that_are_interleaved_and_of_another_type_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss: rows of gate and up take turns, and words are stored as bytes."""

    def interleaved(gate: mx.array, up: mx.array) -> mx.array:
        both = mx.stack([gate, up], axis=2)
        return both.reshape(gate.shape[0], -1, *gate.shape[2:])

    def renamed(name: str, array: mx.array) -> tuple[str, mx.array]:
        if ".experts." not in name:
            return name, array
        if name.endswith(".bias"):
            return name.replace("_proj.bias", "_proj_bias"), array
        if name.endswith(".scales"):
            return name.replace("_proj.scales", "_proj_scales"), array
        blocks = array.view(mx.uint8).reshape(*array.shape[:2], -1, 16)
        return name.replace("_proj.weight", "_proj_blocks"), blocks

    def as_on_the_hub(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        joined = fused(arrays, interleaved)
        return dict(renamed(name, array) for name, array in joined.items())

    model, config = packed("gpt_oss", "mxfp4", monkeypatch)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    del config["quantization"]
    path = rewritten(on_disk(tmp_path, model, config), as_on_the_hub)
    require_same(path, (3,), 8)


def test_a_storm_of_evictions(tmp_path: Path) -> None:
    """Each prompt wants experts that the one before drove out; the slots are as many as a token
    needs."""
    model, config = tiny_models.build("qwen3_moe")
    path = on_disk(tmp_path, model, config)
    whole, some = whole_model(path), Slotted.open(path, 2)
    rng = np.random.default_rng(1)
    for _ in range(40):
        tokens = rng.integers(0, 60, (1, int(rng.integers(1, 9)))).tolist()
        assert np.array_equal(logits(whole, tokens), logits(some.model, tokens))
    counts = [layer.counts for layer in some.slots.layers]
    assert sum(one.misses for one in counts) > 100
    assert some.evictions > 100
    some.close()
