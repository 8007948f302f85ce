"""The part that a tensor's name tells is the part that the model's modules show."""

from __future__ import annotations

import pytest
import tiny_models

from mlxfun.model.anatomy.stored_names import expert_count, expert_of, layer_of, part_of, top_k
from mlxfun.model.model_map import ModelMap, map_model
from mlxfun.model.parameters import flatten


def shown(found: ModelMap, path: str) -> str | None:
    """The part by the model's map, None for what it does not tell."""

    def under(*owners: str) -> bool:
        return any(path.startswith(f"{owner}.") for owner in owners)

    moe = found.experts.layers
    experts = {p.path for layer in moe for p in layer.expert_parameters()}
    if path in experts or under(*(layer.experts for layer in moe if layer.experts_list)):
        return "experts"
    for layer in found.layers:
        if under(*layer.shared):
            return "shared"
        if under(*(mixer.path for mixer in layer.mixers)):
            return "attention"
        if under(*(m for m in layer.mlps if layer.moe is None or m != layer.moe.block)):
            return "dense"
    if under(*(layer.router for layer in moe)):
        return "router"
    ends = [found.embed, found.head.path if found.head else None]
    return "embeddings" if under(*filter(None, ends)) else None


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_every_architecture(name: str) -> None:
    model, config = tiny_models.build(name)
    found = map_model(model, config)
    odd = []
    for path, array in flatten(model.parameters()):
        part = shown(found, path)
        # Norms inside a part are not told apart, and they weigh nothing.
        if part is not None and part_of(path) not in (part, "other" if array.ndim == 1 else part):
            odd.append((path, part, part_of(path)))
    assert [one for one in odd if not one[0].startswith("lm_head.ln.")] == []
    assert expert_count(config) == found.experts.num_experts
    assert top_k(config) == found.experts.top_k


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj_blocks", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.experts.down_proj_bias", "experts"),
        ("model.layers.3.block_sparse_moe.input_linear.weight", "experts"),
        ("model.language_model.layers.3.mlp.experts.down_proj", "experts"),
        ("backbone.layers.3.mixer.experts.17.up_proj.weight", "experts"),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", "shared"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "dense"),
        ("model.layers.3.self_attn.q_norm.weight", "other"),
        ("model.layers.3.self_attn.kv_b_proj.weight", "attention"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "attention"),
        ("lm_head.weight", "embeddings"),
        ("vision_tower.blocks.3.attn.qkv.weight", "unused"),
        ("model.visual.blocks.3.attn.qkv.weight", "unused"),
    ],
)
def test_names_of_the_hub(name: str, part: str) -> None:
    assert part_of(name) == part
    if part not in ("embeddings", "unused"):
        assert layer_of(name) == 3


def test_experts_that_are_stored_one_by_one() -> None:
    assert expert_of("model.layers.3.mlp.experts.17.down_proj.weight") == 17
    assert expert_of("model.layers.3.mlp.switch_mlp.down_proj.weight") is None
    assert expert_of("model.layers.3.mlp.shared_experts.1.down_proj.weight") is None
