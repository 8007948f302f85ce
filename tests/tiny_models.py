"""Tiny random models of the architectures in mlx-lm, made by their real classes.

`tiny_configs.json` holds one config per Mixture-of-Experts architecture (8 experts, top-2, hidden
32), `tiny_dense_configs.json` one per dense architecture (hidden 32, vocabulary 64). Quantised
variants need a wider hidden size: `build(name, wide=True)` scales the dimensions that must be
divisible by a quantisation group.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "tiny_configs.json").read_text()
)
DENSE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "tiny_dense_configs.json").read_text()
)
"""Where a family has both kinds, the dense one ends in `_dense`."""
NOT_RUNNABLE = {"muse_spark"}  # Metal-only kernels
# Metal-only kernels; block-sparse attention that crashes mlx 0.32 on the CPU
DENSE_NOT_RUNNABLE = {"bitnet", "phi3small"}
RUNNABLE = tuple(name for name in CONFIGS if name not in NOT_RUNNABLE)
RUNNABLE_DENSE = tuple(name for name in DENSE if name not in DENSE_NOT_RUNNABLE)
GROUPED = tuple(
    name
    for name in RUNNABLE
    if any(
        node.get("n_group", node.get("num_expert_group", 1)) > 1
        for node in (CONFIGS[name], CONFIGS[name].get("text_config", {}))
    )
    and name not in ("deepseek", "longcat_flash", "longcat_flash_ngram")
)


_WIDE = {
    "hidden_size": 64,
    "model_dim": 64,
    "d_model": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "dense_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 64,
    "share_expert_dim": 64,
    "intermediate_size_mlp": 64,
    "routed_expert_hidden_size": 64,
    "moe_latent_size": 64,
}


def build(
    name: str, seed: int = 0, *, wide: bool = False, **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The architecture's own Model class on a tiny config, zero-initialised routers randomised."""
    config = copy.deepcopy(CONFIGS[name] if name in CONFIGS else DENSE[name])
    if wide:
        _widen(config)
        if name == "phimoe":  # its RoPE factors are sized for a head dimension of 8
            config["num_attention_heads"] = 8
    config.get("text_config", config).update(overrides)
    return from_config(config, seed), config


EXPERTS = {"num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"}
TOP_K = {
    "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k_experts",
}  # fmt: skip


def build_many(name: str, experts: int = 128, top_k: int = 8) -> tuple[nn.Module, dict[str, Any]]:
    """The architecture with as many experts as large models have, in 4 bit and bfloat16."""
    config = copy.deepcopy(CONFIGS[name])
    _widen(config)
    if name == "phimoe":
        config["num_attention_heads"] = 8
    for node in (config, config.get("text_config", {})):
        node.update(dict.fromkeys(EXPERTS & node.keys(), experts))
        node.update({key: top_k for key in TOP_K & node.keys() if node[key] > 1})
    model = from_config(config)
    model.set_dtype(mx.bfloat16)
    return model, quantise(model, config, "affine4")


def _widen(node: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _widen(value)
        elif key in _WIDE:
            node[key] = _WIDE[key]


def empty(config: dict[str, Any]) -> nn.Module:
    """A model of `config`, quantised as it says, whose weights are about to be loaded."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.eval()
    quantization = config.get("quantization")
    if quantization is not None:
        plain = {k: quantization[k] for k in ("group_size", "bits", "mode")}
        nn.quantize(model, **plain, class_predicate=lambda p, m: quantization.get(p, False))
    return model


def from_config(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build `config` with random weights, all evaluated."""
    mx.random.seed(seed)
    model = empty(config)
    model.update(tree_map_with_path(_randomise_zeros, model.parameters()))
    mx.eval(model.parameters())
    return model


MODES = {
    "affine4": {"group_size": 64, "bits": 4, "mode": "affine"},
    "affine8": {"group_size": 64, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
MORE_MODES = {
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
"""For edits that make new weights; slicing does not depend on how they are packed."""


def quantise(model: nn.Module, config: dict[str, Any], mode: str) -> dict[str, Any]:
    """Quantise `model` in place wherever its shapes allow it; return the config that says so."""
    how = (MODES | MORE_MODES)[mode]
    done: dict[str, Any] = {}

    def allowed(path: str, module: nn.Module) -> bool:
        weight = module.get("weight")
        fits = weight is not None and weight.shape[-1] % how["group_size"] == 0
        ok = hasattr(module, "to_quantized") and fits
        if ok:
            done[path] = dict(how)
        return ok

    nn.quantize(model, **how, class_predicate=allowed)
    mx.eval(model.parameters())
    return {**config, "quantization": {**how, **done}}


def _randomise_zeros(path: str, array: mx.array) -> mx.array:
    if "rope" in path.lower() or "vocab_mods" in path or not array.size:
        return array
    if mx.issubdtype(array.dtype, mx.floating) and not mx.any(array).item():
        scale = 0.5 if array.ndim >= 2 else 0.1
        return (mx.random.normal(array.shape) * scale).astype(array.dtype)
    return array
