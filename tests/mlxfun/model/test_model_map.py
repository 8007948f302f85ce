"""One map finds the parts of every architecture and calls them by the same names."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from mlx_lm.models.bitlinear_layers import BitLinear

from mlxfun.errors import ModelError, UsageError
from mlxfun.hooks.head import HeadTap
from mlxfun.model.anatomy import discover
from mlxfun.model.model_map import ModelMap, map_model
from tests.mlxfun.model_parts import ENDS, KINDS, OWN, OWN_NORMS, PARTS

EVERY = (*tiny_models.RUNNABLE, *tiny_models.DENSE)
RUNNABLE = (*tiny_models.RUNNABLE, *tiny_models.RUNNABLE_DENSE)
LINEARS = (nn.Linear, nn.QuantizedLinear, BitLinear)


def mapped(name: str) -> tuple[nn.Module, ModelMap]:
    model, config = tiny_models.build(name)
    return model, map_model(model, config)


def named(found: ModelMap, layer: int) -> dict[str, str]:
    """{name without `layers.N.`: path without the layer's} of the parts of a layer with a role."""
    name, path = f"layers.{layer}.", f"{found.layers[layer].path}."
    return {
        key.removeprefix(name): value.removeprefix(path)
        for key, value in found.paths.items()
        if key.startswith(name) and key != value
    }


@pytest.mark.parametrize(("name", "layer"), PARTS, ids=str)
def test_the_parts_of_a_layer_have_their_canonical_names(name: str, layer: int) -> None:
    _, found = mapped(name)
    assert named(found, layer) == PARTS[name, layer]


@pytest.mark.parametrize("name", ENDS)
def test_embedding_norm_and_head_are_found(name: str) -> None:
    _, found = mapped(name)
    assert (found.embed, found.norm, found.head, len(found.layers)) == ENDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_each_layers_mixer_is_told(name: str) -> None:
    _, found = mapped(name)
    kinds = tuple(layer.mixers[0].kind if layer.mixers else None for layer in found.layers)
    assert kinds == KINDS[name]


@pytest.mark.parametrize("name", EVERY)
def test_every_module_has_one_name_and_every_name_one_module(name: str) -> None:
    model, found = mapped(name)
    modules = {path for path, _ in model.named_modules() if path}
    assert set(found.paths.values()) == modules
    assert len(found.paths) == len(modules)
    for canonical, path in found.paths.items():
        assert found.path(canonical) == path
        assert found.name(path) == canonical
        assert found.path(path) == path


@pytest.mark.parametrize("name", EVERY)
def test_every_decoder_layer_is_found_with_its_parts(name: str) -> None:
    model, found = mapped(name)
    assert len(found.layers) == layers_of_config(name)
    assert [layer.index for layer in found.layers] == list(range(len(found.layers)))
    modules = dict(model.named_modules())
    for layer in found.layers:
        assert layer.mixers or layer.mlps
        linears = [
            path
            for path, module in modules.items()
            if path.startswith(f"{layer.path}.") and isinstance(module, LINEARS)
        ]
        assert linears
        for path in linears:
            if found.name(path) == path:
                assert path.rpartition(".")[2] in OWN, path


def layers_of_config(name: str) -> int:
    config = tiny_models.CONFIGS.get(name) or tiny_models.DENSE[name]
    config = config.get("text_config", config)
    if "hybrid_override_pattern" in config:
        return len(config["hybrid_override_pattern"])
    keys = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
    return next(int(config[key]) for key in keys if key in config)


@pytest.mark.parametrize("name", EVERY)
def test_every_norm_beside_the_parts_of_a_layer_has_a_role(name: str) -> None:
    _, found = mapped(name)
    for layer in found.layers:
        for path in found.names:
            child = path.removeprefix(f"{layer.path}.")
            if "norm" in child and "." not in child and found.name(path) == path:
                assert child in {*OWN_NORMS, "norm_attn_norm"}, path


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_head_makes_the_logits_of_the_vocabulary(name: str) -> None:
    model, found = mapped(name)
    assert found.vocabulary == 64
    tokens = mx.array([[1, 2, 3, 5]])
    if found.head is None:
        assert name == "talkie"
        return
    tap = HeadTap(model, found.head)
    with tap.watching():
        whole = model(tokens)
        assert tap.seen is not None
        assert tap.seen.shape == (1, 4, found.hidden_size)
        assert tap.logits(tap.seen).shape == whole.shape == (1, 4, 64)


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_the_map_of_experts_is_that_of_discovery(name: str) -> None:
    model, config = tiny_models.build(name)
    found = map_model(model, config)
    assert found.moe == discover(model, config)
    assert found.moe is not None
    assert tuple(ly.index for ly in found.layers if ly.moe is not None) == found.moe.indices
    assert len(found.layers) == found.moe.decoder_layers
    for layer in found.moe.layers:
        assert found.path(f"layers.{layer.index}.router") == layer.router
        if not layer.experts_list:
            assert found.path(f"layers.{layer.index}.experts") == layer.experts


@pytest.mark.parametrize("name", tiny_models.DENSE)
def test_a_dense_model_has_no_map_of_experts(name: str) -> None:
    _, found = mapped(name)
    assert found.moe is None
    assert not any(key.endswith((".router", ".experts")) and key != path
                   for key, path in found.paths.items())  # fmt: skip


def test_quantised_and_not_have_the_same_names() -> None:
    for name in ("llama", "qwen3", "phi3", "qwen3_moe"):
        model, config = tiny_models.build(name, wide=True)
        plain = map_model(model, config)
        quantised = map_model(model, tiny_models.quantise(model, config, "affine4"))
        assert quantised.paths == plain.paths
        assert (quantised.hidden_size, quantised.vocabulary) == (64, 64)


def test_experts_in_a_list_are_numbered() -> None:
    _, found = mapped("dbrx")
    assert found.path("layers.1.experts.5.down") == "transformer.blocks.1.ffn.experts.5.w2"
    assert found.path("layers.1.attn.qkv") == "transformer.blocks.1.norm_attn_norm.attn.Wqkv"


def test_two_of_a_kind_in_one_layer_are_numbered() -> None:
    _, found = mapped("longcat_flash")
    assert found.path("layers.0.attn_2.output") == "model.layers.0.self_attn.1.o_proj"
    assert found.path("layers.0.norm2_2") == "model.layers.0.post_attention_layernorm.1"
    assert found.path("layers.0.mlp_3.down") == "model.layers.0.mlps.1.down_proj"


def test_a_module_without_a_role_is_called_by_its_path() -> None:
    _, found = mapped("llama")
    assert found.name("model.layers.0.self_attn.rope") == "model.layers.0.self_attn.rope"


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    _, found = mapped("llama")
    with pytest.raises(
        UsageError, match=r"no module 'layers\.1\.atn\.q'; near are .*layers\.1\.attn\.q"
    ):
        found.path("layers.1.atn.q")
    with pytest.raises(UsageError, match=r"no module 'layers\.3\.attn'"):
        found.path("layers.3.attn")
    with pytest.raises(UsageError, match=r"no module 'model\.layer\.0'"):
        found.name("model.layer.0")


def test_the_head_of_a_tied_model_is_its_embedding() -> None:
    _, found = mapped("qwen3")
    with pytest.raises(UsageError, match="tied to the token embedding, which is named embed"):
        found.path("head")
    assert found.path("embed") == "model.embed_tokens"


def test_a_model_without_decoder_layers_is_refused() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(4, 4)

    with pytest.raises(ModelError, match="cannot find the decoder layers of nothing"):
        map_model(Nothing(), {"model_type": "nothing"})
