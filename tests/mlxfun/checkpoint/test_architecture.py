"""Configs that no model can have, and tensors of a type that the architecture does not have."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxfun.checkpoint.architecture import require_sound
from mlxfun.checkpoint.load import load
from mlxfun.data import demo
from mlxfun.errors import ModelError
from tests.mlxfun import tiny_checkpoints as tiny

WEIGHTS = "model-00001-of-00001.safetensors"
HERE = Path(__file__).resolve().parents[2]
HUGE = 2**31


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.model_path(), tmp_path / "model"))


def change(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("file", ["tiny_configs.json", "tiny_dense_configs.json"])
def test_the_config_of_every_architecture_is_sound(file: str) -> None:
    for name, config in json.loads((HERE / file).read_text()).items():
        require_sound(config, Path(name), 1 << 20)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**6, "is 1000000 and must be a whole number from 1 to 2,048"),
        ("num_hidden_layers", 2000, "must be at most 344, since there are so many tensors in all"),
        ("num_hidden_layers", 0, "is 0 and must be"),
        ("num_hidden_layers", -1, "is -1 and must be"),
        ("num_hidden_layers", 6.5, "is 6.5 and must be a whole number"),
        ("num_hidden_layers", "6", "is '6' and must be a whole number"),
        ("num_hidden_layers", True, "is True and must be a whole number"),
        ("num_hidden_layers", {}, "must be a whole number"),
        ("hidden_size", 0, "is 0 and must be a whole number from 1 to 16,777,216"),
        ("hidden_size", HUGE, f"is {HUGE} and must be"),
        ("vocab_size", 0, "is 0 and must be"),
        ("num_attention_heads", 0, "is 0 and must be"),
        ("num_key_value_heads", 3, "must be a divisor of num_attention_heads"),
        ("head_dim", [], r"is \[\] and must be"),
        ("max_position_embeddings", HUGE, "must be a whole number from 1 to 134,217,728"),
        ("moe_intermediate_size", -64, "is -64 and must be"),
        ("num_experts", HUGE, "must be a whole number from 0 to 65,536"),
        ("num_experts_per_tok", 17, "is 17 and must be from 1 to the number of experts, 16"),
        ("num_experts_per_tok", 0, "is 0 and must be from 1"),
        ("rms_norm_eps", float("nan"), "is nan and must be a number from 0 to 1"),
        ("rms_norm_eps", "tiny", "is 'tiny' and must be"),
        ("rope_theta", 0, "is 0 and must be a number above 0"),
        ("rope_theta", -10000.0, "must be a number above 0"),
        ("rope_theta", float("inf"), "is inf and must be"),
        ("rope_theta", "x" * 5000, "is 'x{199}... and must be"),
        ("rope_scaling", [], r"is \[\] and must be a table"),
        ("rope_scaling", {"rope_type": 3}, ".rope_type is 3 and must be a text"),
        ("rope_scaling", {"type": "linear", "factor": 0}, ".factor is 0 and must be"),
        ("rope_scaling", {"rope_type": "yarn", "factor": float("nan")}, "factor is nan"),
        (
            "rope_scaling",
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1},
            ".high_freq_factor is 1 and must be above low_freq_factor, 4",
        ),
        (
            "rope_parameters",
            {"full_attention": {"rope_theta": 0}},
            ".full_attention.rope_theta is 0",
        ),
        ("norm_topk_prob", "no", "is 'no' and must be true or false"),
        ("tie_word_embeddings", [], r"is \[\] and must be true or false"),
        ("hidden_act", 1, "is 1 and must be a text"),
        ("architectures", [{}], r"is \[{}\] and must be a list of names"),
        ("quantization", {"bits": 7, "group_size": 64}, ".bits is 7 and must be one"),
        ("quantization", {"bits": 4, "group_size": 0}, ".group_size is 0"),
        ("quantization", "4-bit", "is '4-bit' and must be a table"),
    ],
)
def test_a_value_that_no_model_has_is_named_before_anything_is_built(
    model: Path, key: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.checkpoint import load as module

    def built(*_: Any) -> None:
        raise AssertionError("a model was built from it")

    monkeypatch.setattr(module, "_load_lazy", built)
    change(model, **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json: {key}.*{said}"):
        load(model)


@pytest.mark.parametrize("key", ["n_routed_experts", "moe_k"])
def test_a_key_of_another_architecture_is_judged_too(model: Path, key: str) -> None:
    change(model, **{key: "many"})
    with pytest.raises(ModelError, match=f"config.json: {key} is 'many'"):
        load(model)


def test_values_of_every_wrong_kind_are_model_errors_or_change_nothing(model: Path) -> None:
    """Whatever is not judged is left to mlx-lm, and what that raises is a ModelError."""
    original = json.loads((model / "config.json").read_text())
    for key in original:
        for value in (None, -1, 0, 3, 2.5, HUGE, "x", [], [1], {}, {"a": 1}, True):
            change(model, **original | {key: value})
            with contextlib.suppress(ModelError):
                load(model)


@pytest.mark.parametrize(
    "name", ["base", "switch_layers", "cache", "rope_utils", "", "../x", "a.b"]
)
def test_a_model_type_that_names_no_architecture_is_said_to_be_unknown(
    model: Path, name: str
) -> None:
    change(model, model_type=name)
    with pytest.raises(ModelError, match="mlx-lm has no architecture for model_type"):
        load(model)


def test_an_architecture_that_ends_the_program_is_an_error_in_one_sentence(model: Path) -> None:
    """mlx-lm's olmo does where the package ai2-olmo is missing."""
    change(model, model_type="olmo")
    with pytest.raises(
        ModelError, match=r"'olmo' needs a package that is not installed; .* says which"
    ):
        load(model)


# -- types ------------------------------------------------------------------------------------


def relabel(model: Path, tensor: str, dtype: str) -> None:
    """Write another type of the same size into the header."""
    data = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[tensor]["dtype"] = dtype
    raw = json.dumps(header).encode()
    (model / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


@pytest.mark.parametrize(
    ("tensor", "dtype", "said"),
    [
        ("model.layers.2.mlp.gate.weight", "F16", "counterparts in other layers are BF16"),
        ("model.layers.2.mlp.experts.5.up_proj.weight", "I16", "counterparts in other layers are"),
        ("model.norm.weight", "F16", "where all others are BF16"),
        ("model.embed_tokens.weight", "U16", "where all others are BF16"),
    ],
)
def test_a_type_of_the_same_size_is_noticed(
    model: Path, tensor: str, dtype: str, said: str
) -> None:
    relabel(model, tensor, dtype)
    with pytest.raises(ModelError, match=f"'{tensor}' is {dtype} .*{said}"):
        load(model)


@pytest.mark.parametrize("bits", [None, 4])
def test_integers_in_place_of_floats_and_the_reverse_are_noticed(
    tmp_path: Path, bits: int | None
) -> None:
    path = tiny.write(tmp_path / "m", tiny.QWEN3, dtype=mx.float32, bits=bits)
    load(path)
    (file,) = path.glob("model*.safetensors")
    arrays = dict(mx.load(str(file)))
    names = ["model.norm.weight"]
    if bits:
        names += ["lm_head.weight", "lm_head.scales"]
    for name in names:
        other = mx.float32 if arrays[name].dtype == mx.uint32 else mx.uint32
        mx.save_safetensors(str(file), arrays | {name: arrays[name].view(other)})
        with pytest.raises(ModelError, match=f"{name} is .* where the architecture has"):
            load(path)
    mx.save_safetensors(str(file), arrays)
    load(path)


def test_layers_quantised_differently_are_no_mistake(tmp_path: Path) -> None:
    """Types of different sizes side by side, as mixed precision has them."""
    path = tiny.write(tmp_path / "m", tiny.QWEN3, bits=4)
    (file,) = path.glob("model*.safetensors")
    arrays = dict(mx.load(str(file)))
    prefix = "model.layers.1.self_attn.q_proj"
    parts = [arrays.pop(f"{prefix}.{name}") for name in ("weight", "scales", "biases")]
    config = json.loads((path / "config.json").read_text())
    settings = config["quantization"]
    arrays[f"{prefix}.weight"] = mx.dequantize(
        *parts, group_size=settings["group_size"], bits=settings["bits"]
    )
    mx.save_safetensors(str(file), arrays)
    (path / "model.safetensors.index.json").unlink()
    load(path)
