"""One structural discovery finds experts, router, bias, groups and config key everywhere."""

from __future__ import annotations

import pytest
import tiny_models

from mlxfun.errors import ModelError
from mlxfun.model.anatomy import discover, facts

# (MoE decoder layers, router kind, selection bias, shared experts, config key) by hand.
EXPECTED = {
    "qwen3_moe": ((0, 1), "linear", None, 0, ("num_experts",)),
    "qwen2_moe": ((0, 1), "linear", None, 1, ("num_experts",)),
    "qwen3_next": ((0, 1), "linear", None, 1, ("num_experts",)),
    "qwen3_5_moe": ((0, 1), "linear", None, 1, ("text_config", "num_experts")),
    "qwen3_5": ((0, 1), "linear", None, 1, ("text_config", "num_experts")),
    "qwen3_vl_moe": ((0, 1), "linear", None, 0, ("text_config", "num_experts")),
    "mellum": ((0, 1), "linear", None, 0, ("num_experts",)),
    "olmoe": ((0, 1), "linear", None, 0, ("num_experts",)),
    "Klear": ((1,), "linear", "expert_bias", 1, ("num_experts",)),
    "mixtral": ((0, 1), "linear", None, 0, ("num_local_experts",)),
    "phimoe": ((0, 1), "linear", None, 0, ("num_local_experts",)),
    "phixtral": ((0, 1), "linear", None, 0, ("num_local_experts",)),
    "gpt_oss": ((0, 1), "linear", None, 0, ("num_local_experts",)),
    "granitemoe": ((0, 1), "inner-linear", None, 0, ("num_local_experts",)),
    "granitemoehybrid": ((0, 1), "inner-linear", None, 0, ("num_local_experts",)),
    "jamba": ((1,), "linear", None, 0, ("num_experts",)),
    "ernie4_5_moe": ((1,), "linear", None, 1, ("moe_num_experts",)),
    "hunyuan": ((0, 1), "inner-linear", None, 1, ("num_experts",)),
    "lfm2_moe": ((1,), "linear", "expert_bias", 0, ("num_experts",)),
    "minimax": ((0, 1), "linear", "e_score_correction_bias", 0, ("num_local_experts",)),
    "minimax_m3_vl": (
        (1,),
        "linear",
        "e_score_correction_bias",
        1,
        ("text_config", "num_local_experts"),
    ),
    "afmoe": ((1,), "inner-linear", "expert_bias", 1, ("num_experts",)),
    "bailing_moe": ((1,), "inner-linear", "expert_bias", 1, ("num_experts",)),
    "bailing_moe_linear": ((1,), "inner-linear", "expert_bias", 1, ("num_experts",)),
    "bailing_hybrid": ((1,), "inner-linear", "expert_bias", 1, ("num_experts",)),
    "bailing_moe_v3": ((1,), "weight", "expert_bias", 1, ("num_experts",)),
    "deepseek": ((1,), "weight", None, 1, ("n_routed_experts",)),
    "deepseek_v2": ((1,), "weight", None, 1, ("n_routed_experts",)),
    "deepseek_v3": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "deepseek_v32": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "glm_moe_dsa": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "kimi_vl": (
        (1,),
        "weight",
        "e_score_correction_bias",
        1,
        ("text_config", "n_routed_experts"),
    ),
    "kimi_k25": (
        (1,),
        "weight",
        "e_score_correction_bias",
        1,
        ("text_config", "n_routed_experts"),
    ),
    "deepseek_v41": ((0, 1), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "dots1": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "exaone_moe": ((1,), "weight", "e_score_correction_bias", 1, ("num_experts",)),
    "glm4_moe": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "glm4_moe_lite": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "solar_open": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "mimo_v2_flash": ((1,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "mistral4": ((1,), "linear", None, 1, ("n_routed_experts",)),
    "mistral3": ((1,), "linear", None, 1, ("text_config", "n_routed_experts")),
    "kimi_linear": ((1,), "linear", "e_score_correction_bias", 1, ("num_experts",)),
    "kimi_k3": ((1,), "linear", "e_score_correction_bias", 1, ("text_config", "num_experts")),
    "laguna": ((1,), "inner-linear", "e_score_correction_bias", 1, ("num_experts",)),
    "step3p5": ((1,), "inner-linear", "router_bias", 1, ("moe_num_experts",)),
    "nemotron_h": ((2,), "weight", "e_score_correction_bias", 1, ("n_routed_experts",)),
    "longcat_flash": (
        (0, 1),
        "inner-linear",
        "e_score_correction_bias",
        0,
        ("n_routed_experts",),
    ),
    "longcat_flash_ngram": (
        (0, 1),
        "inner-linear",
        "e_score_correction_bias",
        0,
        ("n_routed_experts",),
    ),
    "llama4": ((1, 3), "linear", None, 1, ("text_config", "num_local_experts")),
    "gemma4_text": ((0, 1), "inner-linear", None, 0, ("num_experts",)),
    "gemma4": ((0, 1), "inner-linear", None, 0, ("text_config", "num_experts")),
    "dbrx": ((0, 1), "inner-linear", None, 0, ("ffn_config", "moe_num_experts")),
}
GROUPED = {
    "afmoe", "bailing_moe", "bailing_moe_linear", "bailing_hybrid", "bailing_moe_v3",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_vl", "kimi_k25", "dots1",
    "exaone_moe", "glm4_moe", "glm4_moe_lite", "solar_open", "mimo_v2_flash", "mistral4",
    "mistral3", "kimi_linear", "kimi_k3", "nemotron_h",
}  # fmt: skip


def test_every_tiny_architecture_has_an_expectation():
    assert set(EXPECTED) == set(tiny_models.RUNNABLE)


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_discovery_describes_every_architecture(name):
    model, config = tiny_models.build(name)
    anatomy = discover(model, config)
    layers, kind, bias, shared, key = EXPECTED[name]
    assert anatomy.indices == layers
    assert anatomy.count_key == key
    for position, layer in enumerate(anatomy.layers):
        assert layer.position == position
        assert layer.router_kind == kind
        assert layer.bias_name == bias
        assert len(layer.shared) == shared
        assert layer.num_experts == 8
        assert layer.top_k == (1 if name == "llama4" else 2)
        assert (layer.n_group, layer.topk_group) == ((2, 1) if name in GROUPED else (1, 1))
        assert layer.router_rows == (12 if name.startswith("longcat") else 8)
        assert layer.family in facts.BLOCKS


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_every_array_that_counts_experts_is_known(name):
    """A second, naive look: any array of the block with 8 (longcat: 12) rows must be sliced."""
    model, config = tiny_models.build(name)
    anatomy = discover(model, config)
    for layer in anatomy.layers:
        known = {p.path for p in layer.parameters}
        for path, array in _arrays(model):
            belongs = path.startswith((f"{layer.experts}.", f"{layer.router}."))
            if belongs and not layer.experts_list and array.shape[0] in (8, 12):
                assert path in known, path


def _arrays(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_the_expert_count_is_written_under_its_own_key_and_nothing_else():
    model, config = tiny_models.build("qwen3_5_moe")
    changed = discover(model, config).with_count(config, 6)
    assert changed["text_config"]["num_experts"] == 6
    assert config["text_config"]["num_experts"] == 8
    assert {k: v for k, v in changed.items() if k != "text_config"} == {
        k: v for k, v in config.items() if k != "text_config"
    }


def test_muse_spark_is_refused_with_the_reason():
    model, config = tiny_models.build("muse_spark")
    with pytest.raises(
        ModelError, match="muse_spark is not supported: its MoE blocks run in Metal"
    ):
        discover(model, config)


@pytest.mark.parametrize("name", ["llama", "gemma4_text_dense", "mamba"])
def test_a_dense_model_has_no_moe_layers(name: str):
    anatomy = discover(*tiny_models.build(name))
    assert anatomy.layers == anatomy.indices == anatomy.count_key == ()
    assert (anatomy.num_experts, anatomy.top_k, anatomy.vocabulary) == (0, 0, 64)
    assert anatomy.position_of(0) is None
