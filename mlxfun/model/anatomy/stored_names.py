"""What a tensor of a checkpoint is, by its name: before a model is built, or even downloaded.

Names are those of mlx-lm's parameters and those of the Hub, which `sanitize` turns into them. Tests
hold this against what the modules show, for every architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from mlxfun.model.anatomy.facts import (
    EXPERT_COUNT_KEYS,
    NESTED_CONFIGS,
    SHARED_NAMES,
    TOP_K_KEYS,
)

Part = Literal["attention", "shared", "experts", "dense", "router", "embeddings", "other", "unused"]
"""attention: whatever mixes tokens. shared: experts that every token uses. dense: feed-forward parts
without experts. embeddings: with the output head. other: norms, and what no rule knows. unused: what
mlx-lm leaves behind, such as vision towers."""
PARTS: tuple[Part, ...] = get_args(Part)

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts?\.(\d+)\.")
_SHARED = re.compile(rf"\.(?:{'|'.join(SHARED_NAMES)})\.")
_NORM = re.compile(r"norm\w*\.(?:\w+\.)?(?:weight|bias)$|_norm\w*$|layernorm")
# Behind the name of the stacks, of one expert, or of a block whose own projections are stacks.
_STACKS = re.compile(
    r"\.(?:switch_mlp|switch_glu)\.|\.experts\.(?:\d+\.|(?:gate|up|down|gate_up)_proj)"
    r"|\.experts\.(?:w[123]|fc[12])\b|block_sparse_moe\.(?:input_linear|output_linear)\."
)
_ROUTER = re.compile(
    r"\.(?:gate|router)(?:\.|$)|e_score_correction_bias|expert_bias|router_bias|shared_expert_gate"
)
_MIXER = re.compile(
    r"\.(?:self_attn|attn|attention|linear_attn|norm_attn_norm|mamba|mixer|conv|attn_hc)\."
)
_DENSE = re.compile(r"\.(?:mlp|mlps|feed_forward|ffn|block_sparse_moe|moe)\.")
_ENDS = re.compile(
    r"(?:^|\.)(?:embed_tokens|embeddings|ngram_embeddings|wte|embed_in|tok_embeddings|word_embeddings"
    r"|lm_head|output|output_projection|embed_out)\."
)


_UNUSED = re.compile(
    r"(?:^|\.)(?:vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|mtp\w*)\."
    r"|rotary_emb\.inv_freq"
)


def part_of(name: str) -> Part:
    """The part of the model that a tensor belongs to."""
    if _UNUSED.search(name):
        return "unused"
    if _LAYER.search(name) is None:
        return "embeddings" if _ENDS.search(name) and not _NORM.search(name) else "other"
    if _SHARED.search(name):
        return "shared"
    if _STACKS.search(name):
        return "experts"
    if _ROUTER.search(name):
        return "router"
    if _NORM.search(name):
        return "other"
    if _MIXER.search(name):
        return "attention"
    return "dense" if _DENSE.search(name) else "other"


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor, None outside of layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def expert_of(name: str) -> int | None:
    """The number of the expert that alone is in a tensor, None for a stack and for other tensors."""
    found = _EXPERT.search(name)
    return int(found[1]) if found and part_of(name) == "experts" else None


def _nodes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in NESTED_CONFIGS:
        node = config.get(key)
        if isinstance(node, Mapping):
            yield node
    yield config


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for node in _nodes(config):
        for key in keys:
            value = node.get(key)
            if isinstance(value, list):
                value = max((v for v in value if isinstance(v, int)), default=None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def expert_count(config: Mapping[str, Any]) -> int:
    """E by config.json, 0 where it does not say."""
    return _first(config, EXPERT_COUNT_KEYS)


def top_k(config: Mapping[str, Any]) -> int:
    """K by config.json, 0 where it does not say."""
    return _first(config, TOP_K_KEYS)


def hidden_size(config: Mapping[str, Any]) -> int:
    """D by config.json, 0 where it does not say."""
    return _first(config, ("hidden_size", "d_model", "model_dim", "n_embd"))
