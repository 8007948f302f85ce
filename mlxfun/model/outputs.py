"""Finds the projections of each decoder layer whose output is added to the residual stream.

They are the outputs of mixers and feed-forward parts (mlxfun.model.model_map). Where a family
normalises what a part puts out before adding it, an output names those norms, first the one that
is applied first. Experts that work in a smaller latent space do not write to the stream
themselves: the projection that leads back to it does, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import ModelError
from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.model.anatomy.names import numbered
from mlxfun.model.anatomy.types import DecoderLayer, MoELayer
from mlxfun.model.components import Component
from mlxfun.model.model_map import ModelMap

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Output:
    """One projection that writes to the residual stream.

    path: of the module. layer: decoder layer. position: of its MoE layer, None in others.
    component: see mlxfun.model.components. norms: paths of what its output passes before it is added.
    rows: "stack" for a stack of all experts, "one" for one expert (`expert`) of a list, "" for
    everything else, the projection out of a latent space included. through: for a stack of experts
    in a latent space the path of that projection; the stack itself writes to the latent space.
    """

    path: str
    layer: int
    position: int | None
    component: Component
    norms: tuple[str, ...]
    rows: Literal["stack", "one", ""] = ""
    expert: int | None = None
    through: Output | None = None


def part_path(output: Output, layer: DecoderLayer) -> str:
    """The module whose output `output` is a summand of: the attention or feed-forward part of its
    layer, or where the layer calls the projection itself, that."""
    names = output.path[len(layer.path) + 1 :].split(".")
    return ".".join([layer.path, *names[: 2 if len(names) > 1 and names[1].isdigit() else 1]])


def residual_outputs(modules: Modules, found: ModelMap) -> tuple[Output, ...]:
    """Every projection that writes to the residual stream, in the order of layers.

    modules: by path, as named when the model was loaded.

    Raises ModelError when a part has none that is known, which an unknown architecture would show
    by, and for families whose stream cannot be edited by projections.
    """
    return tuple(output for layer in found.layers for output in _of_layer(modules, found, layer))


def leaks(modules: Modules, found: ModelMap) -> list[str]:
    """Sentences on what a model writes to the stream that no projection puts out."""
    families = dict.fromkeys(module_name(modules[layer.path]) for layer in found.layers)
    return [f"{family}: {facts.LEAKS[family]}" for family in families if family in facts.LEAKS]


def _of_layer(modules: Modules, found: ModelMap, layer: DecoderLayer) -> Iterator[Output]:
    family = module_name(modules[layer.path])
    if family in facts.NO_PROJECTIONS:
        raise ModelError(f"{found.model_type} cannot be edited: {facts.NO_PROJECTIONS[family]}")
    one = _Outputs(modules, found, layer, facts.OUTPUT_NORMS.get(family, {}))
    prefix = f"layers.{layer.index}"
    for i in range(len(layer.mixers)):
        yield one.named(f"{numbered(f'{prefix}.attn', i)}.output", "attention", layer.post_norm1)
    for i, path in enumerate(layer.mlps):
        if layer.moe is None or path != layer.moe.block:
            yield one.named(f"{numbered(f'{prefix}.mlp', i)}.down", "dense", layer.post_norm2)
    for name in facts.FURTHER_OUTPUTS:
        if isinstance(modules[layer.path].get(name), nn.Module):
            yield one.at(f"{layer.path}.{name}", "dense", ())
    for i in range(len(layer.shared)):
        yield one.named(f"{numbered(f'{prefix}.shared', i)}.down", "shared", layer.post_norm2)
    if layer.moe is not None:
        yield from _of_experts(one, layer, layer.moe)


class _Outputs:
    """Makes the outputs of one layer."""

    def __init__(
        self,
        modules: Modules,
        found: ModelMap,
        layer: DecoderLayer,
        norms: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.modules, self.found, self.layer, self._norms = modules, found, layer, norms

    def named(self, name: str, component: Component, norms: tuple[str, ...]) -> Output:
        """The output of that canonical name."""
        path = self.found.paths.get(name)
        if path is None:
            raise ModelError(
                f"cannot tell where decoder layer {self.layer.index} ({self.layer.path}) of "
                f"{self.found.model_type} writes to the residual stream: there is no {name}; "
                "please report the architecture"
            )
        return self.at(path, component, norms)

    def at(self, path: str, component: Component, norms: tuple[str, ...]) -> Output:
        """The output at `path`, which must be as wide as the stream."""
        weight = self.modules[path].get("weight")
        if not isinstance(weight, mx.array) or weight.shape[-2] != self.found.hidden_size:
            raise ModelError(
                f"{path} of {self.found.model_type} does not put out the "
                f"{self.found.hidden_size} values of the residual stream as rows of a weight, so "
                "it cannot be edited; please report the architecture"
            )
        position = self.layer.moe.position if self.layer.moe is not None else None
        return Output(path, self.layer.index, position, component, self.behind(path, norms))

    def behind(self, path: str, norms: tuple[str, ...]) -> tuple[str, ...]:
        """The norms that what `path` puts out passes: a row of `facts`, or those of its part."""
        child = path[len(self.layer.path) + 1 :].partition(".")[0]
        if child not in self._norms:
            return norms
        named = (f"{self.layer.path}.{name}" for name in self._norms[child])
        return tuple(path for path in named if path in self.modules)


def _of_experts(one: _Outputs, layer: DecoderLayer, moe: MoELayer) -> Iterator[Output]:
    prefix, norms = f"layers.{layer.index}.experts", layer.post_norm2
    if moe.experts_list:
        for expert in range(moe.num_experts):
            output = one.named(f"{prefix}.{expert}.down", "experts", norms)
            yield replace(output, rows="one", expert=expert)
        return
    for name in facts.LATENT_OUTPUTS:
        if isinstance(one.modules[moe.block].get(name), nn.Module):
            back = one.at(f"{moe.block}.{name}", "experts", norms)
            yield back
            norm = f"{moe.block}.{facts.LATENT_NORM}"
            yield replace(
                back,
                path=one.found.path(f"{prefix}.down"),
                norms=(norm,) if norm in one.modules else (),
                rows="stack",
                through=back,
            )
            return
    yield replace(one.named(f"{prefix}.down", "experts", norms), rows="stack")


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
