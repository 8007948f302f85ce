"""Finds the projections of each decoder layer whose output is added to the residual stream.

They are found by name and by size among the modules of each decoder layer. Where a family
normalises what a projection puts out before adding it, the row in `POST_NORMS` names those norms,
first the one that is applied first. Experts that work in a smaller latent space do not write to
the stream themselves: the projection that leads back to it does, for all of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import ModelError
from mlxfun.model.anatomy.types import Anatomy, MoELayer

Modules = Mapping[str, nn.Module]

COMPONENTS = ("attention", "dense", "shared", "experts")
"""Parts of a layer: attention in the wide sense (linear attention, state space, convolution too),
dense feed-forward parts, shared experts, routed experts."""

_LATENT = ("fc2_latent_proj", "routed_expert_up_proj")
_LATENT_NORM = "routed_expert_norm"
_MIXERS = ("o_proj", "out_proj", "dense", "o_b_proj")
_FEED_FORWARD = ("down_proj", "fc2", "w2", "output_linear", "per_layer_projection")
_NAMES = (*_MIXERS, *_FEED_FORWARD, *_LATENT)

POST_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "afmoe": {
        "self_attn": ("post_attention_layernorm",),
        "mlp": ("post_mlp_layernorm",),
    },
    "gemma4_text": {
        "self_attn": ("post_attention_layernorm",),
        "mlp": ("post_feedforward_layernorm_1", "post_feedforward_layernorm"),
        "experts": ("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
        "per_layer_projection": ("post_per_layer_input_norm",),
    },
}
"""{module that defines the decoder layer: {child of the layer: norms its output passes}}."""

LEAKS: dict[str, str] = {
    "longcat_flash": "its identity experts add their own input to the residual stream, and no "
    "weights of theirs could be projected: a token routed to one keeps what it has",
}
"""Families that write to the stream in a way that is in no projection, and how."""


@dataclass(frozen=True, slots=True)
class Output:
    """One projection that writes to the residual stream.

    path: of the module. layer: decoder layer. position: of its MoE layer, None in others.
    component: see COMPONENTS. norms: paths of what its output passes before it is added.
    rows: "stack" for a stack of all experts, "one" for one expert (`expert`) of a list, "" for
    everything else, the projection out of a latent space included. through: for a stack of experts
    in a latent space the path of that projection; the stack itself writes to the latent space.
    """

    path: str
    layer: int
    position: int | None
    component: str
    norms: tuple[str, ...]
    rows: str = ""
    expert: int | None = None
    through: Output | None = None


def list_of(path: str) -> str:
    """The path of the list that holds a decoder layer's module: model.layers.3.mlp -> model.layers."""
    return ".".join(itertools.takewhile(lambda part: not part.isdigit(), path.split(".")))


def decoder_layers(modules: Modules, anatomy: Anatomy) -> dict[int, str]:
    """{number: path} of all decoder layers, MoE or not, in order.

    Raises ModelError for a model whose MoE layers are in several lists.
    """
    parents = {list_of(layer.block) for layer in anatomy.layers}
    if len(parents) != 1:
        raise ModelError(
            f"{anatomy.model_type} keeps its MoE layers in several lists ({', '.join(parents)}), "
            "so that their order cannot be told; please report the architecture"
        )
    prefix = f"{parents.pop()}."
    found = {
        int(path[len(prefix) :]): path
        for path in modules
        if path.startswith(prefix) and path[len(prefix) :].isdigit()
    }
    return dict(sorted(found.items()))


def residual_outputs(modules: Modules, anatomy: Anatomy) -> tuple[Output, ...]:
    """Every projection that writes to the residual stream, in the order of layers.

    modules: by path, as named when the model was loaded.

    Raises ModelError when a layer has none, which an unknown architecture would show by.
    """
    layers = decoder_layers(modules, anatomy)
    width = _width(modules, layers.values())
    moe = {layer.index: layer for layer in anatomy.layers}
    found: list[Output] = []
    for number, path in layers.items():
        outputs = list(_of_layer(modules, path, (number, width), moe.get(number)))
        if not outputs:
            raise ModelError(
                f"cannot tell where decoder layer {number} ({path}) of {anatomy.model_type} "
                "writes to the residual stream; please report the architecture"
            )
        found += outputs
    return tuple(found)


def _width(modules: Modules, layers: Iterable[str]) -> int:
    """D, as most attention parts of the layers put it out (0 where there are none)."""
    sizes = Counter(
        int(module.weight.shape[-2])
        for layer in layers
        for path, module in modules.items()
        if path.startswith(f"{layer}.") and _is_projection(path, module, _MIXERS)
    )
    return sizes.most_common(1)[0][0] if sizes else 0


def _is_projection(path: str, module: nn.Module, names: tuple[str, ...]) -> bool:
    return path.rpartition(".")[2] in names and isinstance(module.get("weight"), mx.array)


def _of_layer(
    modules: Modules, layer: str, where: tuple[int, int], moe: MoELayer | None
) -> Iterator[Output]:
    number, width = where
    family = type(modules[layer]).__module__.rpartition(".")[2]
    norms = POST_NORMS.get(family, {})
    position = moe.position if moe is not None else None
    for path in [p for p in modules if p.startswith(f"{layer}.")]:
        module = modules[path]
        if not _is_projection(path, module, _NAMES) or module.weight.shape[-2] != width:
            continue
        component, rows, expert = _role(path, path.rpartition(".")[2], moe)
        child = path[len(layer) + 1 :].partition(".")[0]
        chain = tuple(f"{layer}.{n}" for n in norms.get(child, ()) if f"{layer}.{n}" in modules)
        found = Output(path, number, position, component, chain, rows, expert)
        yield found
        if moe is not None and path.rpartition(".")[2] in _LATENT:
            yield _latent_stack(modules, moe, found)


def _latent_stack(modules: Modules, moe: MoELayer, back: Output) -> Output:
    """The stack of experts whose latent output `back` leads to the residual stream."""
    stack = next(
        path
        for path, module in modules.items()
        if path.startswith(f"{moe.experts}.") and _is_projection(path, module, _FEED_FORWARD)
    )
    norm = f"{moe.block}.{_LATENT_NORM}"
    return replace(
        back,
        path=stack,
        norms=(norm,) if isinstance(modules.get(norm), nn.Module) else (),
        rows="stack",
        through=back,
    )


def _role(path: str, name: str, moe: MoELayer | None) -> tuple[str, str, int | None]:
    """(component, rows, expert) of a projection."""
    if moe is not None and path.startswith(f"{moe.experts}."):
        if moe.experts_list:
            return "experts", "one", int(path[len(moe.experts) + 1 :].partition(".")[0])
        return "experts", "stack", None
    if name in _LATENT:
        return "experts", "", None
    # Shared experts are children of the block; granite keeps them beside it.
    if any(part.startswith("share") for part in path.split(".")):
        return "shared", "", None
    return ("attention" if name in _MIXERS else "dense"), "", None


def gain(modules: Modules, output: Output, width: int) -> mx.array:
    """The product of the gains of the norms behind an output, float32 [width]; ones without any.

    A RMS norm divides by one number and multiplies by its gain g. Then d . norm(z) = 0 exactly if
    (g * d) . z = 0, so a direction d behind the norm is g * d where the projection puts out.
    """
    total = mx.ones(width, dtype=mx.float32)
    for path in output.norms:
        # The norm of ones, whose RMS is 1, is its gain, also where it stores g - 1.
        norm: Any = modules[path]
        total = total * norm(mx.ones(width, dtype=mx.float32)).astype(mx.float32)
    return total
