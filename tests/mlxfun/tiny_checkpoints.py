"""Tiny random checkpoints on disk, built from the real upstream classes.

Their vocabulary is the beginning of the bundled model's. An output head with all of its 4,096 tokens
took most of the time of the tests that use them: MLX multiplies bfloat16 on a CPU without a BLAS.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

from mlxfun.data import demo

VOCABULARY = 512
"""Tokens: the special ones, the bytes, and the first merges."""
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
QWEN3 = {
    **COMMON,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_VL = {
    "model_type": "qwen3_vl_moe",
    "text_config": {**QWEN3, "model_type": "qwen3_vl_moe_text"},
    "vision_config": {"depth": 1, "hidden_size": 8},
}
DEEPSEEK_V3 = {
    **COMMON,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@functools.cache
def tokenizer_json(size: int) -> str:
    """The bundled tokenizer with its first `size` tokens only; every text can be written in them."""
    tokenizer = json.loads((demo.model_path() / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    pairs = [one if isinstance(one, list) else one.split(" ") for one in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    return json.dumps(tokenizer)


def write_tokenizer(path: Path, size: int = VOCABULARY) -> None:
    """Write the files of the bundled tokenizer, with its first `size` tokens, to a directory."""
    for file in TOKENIZER_FILES:
        (path / file).write_bytes((demo.model_path() / file).read_bytes())
    (path / "tokenizer.json").write_text(tokenizer_json(size))


def build(config: dict[str, Any], dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A random model in `dtype`, float32 parameters that stay so upstream excepted."""
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def write(
    path: Path,
    config: dict[str, Any],
    *,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    shards: int = 1,
    extra: dict[str, mx.array] | None = None,
) -> Path:
    """Save a random checkpoint of `config` with a tokenizer; `extra` tensors go along."""
    model, config = build(config, dtype), copy.deepcopy(config)
    if bits is not None:
        model, config = quantize_model(model, config, 32, bits)
    return save(path, model, config, shards, extra)


def save(
    path: Path,
    model: nn.Module,
    config: dict[str, Any],
    shards: int = 1,
    extra: dict[str, mx.array] | None = None,
) -> Path:
    """Write a model with the bundled tokenizer, as far as its vocabulary goes."""
    path.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters())) | (extra or {})
    names = list(weights)
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in names[i::shards]}
        mx.save_safetensors(str(path / name), part, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (path / "config.json").write_text(json.dumps(config))
    inner = config.get("text_config", config)
    write_tokenizer(path, max(inner.get("vocab_size") or inner["num_vocab"], VOCABULARY))
    return path
