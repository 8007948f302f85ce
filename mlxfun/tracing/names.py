"""The names of the values of a forward, and which module or hook each is read from.

    embed                          what the token embedding puts out
    layers.3.input                 the residual stream that enters a decoder layer
    layers.3.residual              the residual stream that leaves it
    layers.3.attn.output           what its attention (or other mixer) puts out
    layers.3.attn.q, .k, .v        its projections, where they are modules of their own
    layers.3.attn.queries, .keys, .values, .weights, .heads
                                   see mlxfun.hooks.attention
    layers.3.mlp.gate, .up         projections of a dense feed-forward part
    layers.3.mlp.output            what the feed-forward part, dense or of experts, puts out
    layers.3.norm1, .norm2         norms of what enters attention and feed-forward part
    layers.3.router.logits, .choice, .weights
                                   see mlxfun.hooks.expert_probe
    layers.3.experts.7.output      what expert 7 adds for the tokens that it serves
    norm, output                   the final norm; the logits

A module's canonical name (mlxfun.model.anatomy.names) or path stands for what it puts out, and with
`.input` for what it takes. In place of a layer's number `*`, `2-5` and `1,4` name several layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, get_args

import mlx.nn as nn

from mlxfun.errors import UsageError
from mlxfun.hooks.attention import ATTENTION_PARTS, AttentionPart
from mlxfun.hooks.expert_probe import RoutePart
from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.fused import fused_columns
from mlxfun.model.anatomy.layers import children, module_name
from mlxfun.model.anatomy.types import DecoderLayer
from mlxfun.model.model_map import ModelMap

Kind = Literal["output", "input", "attention", "route", "expert", "logits"]
RouteName = Literal["logits", "choice", "weights"]
ROUTE_NAMES: tuple[RouteName, ...] = get_args(RouteName)
NEAR = 6


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a forward. name: canonical. path: the module that it is read at.

    layer: decoder layer, None outside of all. attention, route: the part of either. expert: its
    number in the checkpoint. columns: of the module's output, None for all.
    """

    name: str
    kind: Kind
    path: str
    layer: int | None = None
    attention: AttentionPart | None = None
    route: RoutePart | None = None
    expert: int | None = None
    columns: tuple[int, ...] | None = None

    @property
    def described(self) -> str:
        """The name, with the module's path where that is another."""
        path = self.path or "the model"
        return self.name if path in self.name else f"{self.name} ({path})"


class Names:
    """All names of one model. See the module's text."""

    def __init__(self, found: ModelMap, modules: Mapping[str, nn.Module]) -> None:
        self._map, self._modules = found, modules

    # -- what there is --------------------------------------------------------------------------

    @cached_property
    def points(self) -> Mapping[str, Point]:
        """{canonical name: point}; of the experts of a layer only the first."""
        found = {
            name: Point(name, "output", path, self._layer_of(path))
            for name, path in self._map.paths.items()
            if not self._in_stack(path)
        }
        for layer in self._map.layers:
            found |= {point.name: point for point in self._of_layer(layer)}
        found["output"] = Point("output", "logits", "")
        return found

    def _in_stack(self, path: str) -> bool:
        """Whether a module is inside a stack of experts, which takes tokens in its own order."""
        return any(
            not layer.experts_list and path.startswith(f"{layer.experts}.")
            for layer in self._map.experts.layers
        )

    def _layer_of(self, path: str) -> int | None:
        for layer in self._map.layers:
            if path == layer.path or path.startswith(f"{layer.path}."):
                return layer.index
        return None

    def _of_layer(self, layer: DecoderLayer) -> Iterator[Point]:
        i, prefix = layer.index, f"layers.{layer.index}"
        yield Point(f"{prefix}.input", "input", layer.path, i)
        yield Point(f"{prefix}.residual", "output", layer.path, i)
        for number, mixer in enumerate(layer.mixers):
            name = f"{prefix}.attn" if number == 0 else f"{prefix}.attn_{number + 1}"
            path = called(self._modules, mixer.path)
            yield Point(name, "output", path, i)
            yield Point(f"{name}.output", "output", path, i)
            yield Point(f"{name}.input", "input", path, i)
            if mixer.kind == "attention":
                yield from self._fused(name, path, i)
                by_hand = module_name(self._modules[path]) in facts.SOFTMAX_ATTENTION
                for part in ("weights", "heads") if by_hand else ATTENTION_PARTS:
                    yield Point(f"{name}.{part}", "attention", path, i, attention=part)
        for number, path in enumerate(layer.mlps):
            name = f"{prefix}.mlp" if number == 0 else f"{prefix}.mlp_{number + 1}"
            yield Point(f"{name}.output", "output", path, i)
            yield Point(f"{name}.input", "input", path, i)
        if layer.moe is not None:
            block = layer.moe.block
            for route in ROUTE_NAMES:
                yield Point(f"{prefix}.router.{route}", "route", block, i, route=route)
            yield self._expert(layer, 0)

    def _fused(self, name: str, path: str, layer: int) -> Iterator[Point]:
        """Queries, keys and values of a projection that makes all three."""
        fused, output = (self._map.paths.get(f"{name}.{role}") for role in ("qkv", "output"))
        if fused is not None and output is not None:
            for role, columns in fused_columns(self._modules, path, fused, output).items():
                yield Point(f"{name}.{role}", "output", fused, layer, columns=columns)

    def _expert(self, layer: DecoderLayer, expert: int) -> Point:
        assert layer.moe is not None
        name = f"layers.{layer.index}.experts.{expert}.output"
        return Point(
            name, "expert", layer.moe.block, layer.index, route="contribution", expert=expert
        )

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._map.layers)

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """Every beginning of a name, by whole parts, paths of modules included."""
        found: set[str] = set()
        for name in (*self.points, *self._map.names):
            parts = name.split(".")
            found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return frozenset(found)

    # -- finding one ------------------------------------------------------------------------------

    def leads_somewhere(self, prefix: str) -> bool:
        """Whether a name begins with `prefix`, or is it; of several layers, those of any."""
        parts = prefix.split(".")
        if parts[0] == "layers" and len(parts) > 1 and not parts[1].isdigit():
            which = range(self.layers) if parts[1] == "*" else self.numbers(parts[1])
            return any(
                self.leads_somewhere(".".join(["layers", str(n), *parts[2:]])) for n in which
            )
        if prefix in self.prefixes:
            return True
        return self._expert_named(".".join([*parts[:4], "output"])) is not None and (
            parts[4:] in ([], ["output"])
        )

    def point(self, name: str) -> Point:
        """The point of one name. Raises UsageError for an unknown one, with near names."""
        name = self._counted(name)
        found = self.points.get(name) or self._expert_named(name)
        if found is not None:
            return found
        for suffix, kind in ((".output", "output"), (".input", "input")):
            base = name.removesuffix(suffix)
            if base == name:
                continue
            known = self._map.paths.get(base) or (base if base in self._map.names else None)
            if known is not None and not self._in_stack(known):
                which: Kind = "input" if kind == "input" else "output"
                return Point(name, which, known, self._layer_of(known))
        if name in self._map.names and not self._in_stack(name):
            return Point(self._map.names[name], "output", name, self._layer_of(name))
        raise UsageError(self.unknown(name))

    def several(self, pattern: str) -> tuple[Point, ...]:
        """The points of a name in which `*`, `2-5` or `1,4` may stand for a layer's number.

        `*` leaves out the layers that have no such value; a number that was given is required.
        """
        head, _, rest = pattern.partition(".")
        which, _, tail = rest.partition(".")
        if head != "layers" or not tail or which.lstrip("-").isdigit():
            return (self.point(pattern),)
        if which == "*":
            names = [f"layers.{layer.index}.{tail}" for layer in self._map.layers]
            found = [name for name in names if self._knows(name)]
            if not found:
                raise UsageError(self.unknown(f"layers.0.{tail}"))
            return tuple(self.point(name) for name in found)
        return tuple(self.point(f"layers.{n}.{tail}") for n in self.numbers(which))

    def numbers(self, text: str) -> tuple[int, ...]:
        """Layers as they are typed: 1,4 or 2-5."""
        found: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise UsageError(
                    f"{text!r} names no layers; write numbers as in 3, 1,4 or 2-5, or * for all"
                )
            found += range(int(first), int(last if dash else first) + 1)
        return tuple(found)

    def _knows(self, name: str) -> bool:
        try:
            self.point(name)
        except UsageError:
            return False
        return True

    def _counted(self, name: str) -> str:
        """A layer that is counted from the end, as layers.-1, by its number."""
        parts = name.split(".")
        if parts[0] == "layers" and len(parts) > 1 and parts[1].lstrip("-").isdigit():
            index, count = int(parts[1]), len(self._map.layers)
            if not -count <= index < count:
                raise UsageError(
                    f"{name}: there is no decoder layer {index}; {self._map.model_type} has "
                    f"{count}, 0 to {count - 1}"
                )
            parts[1] = str(index % count)
        return ".".join(parts)

    def _expert_named(self, name: str) -> Point | None:
        parts = name.split(".")
        if parts[0] != "layers" or parts[2:3] != ["experts"] or len(parts) not in (4, 5):
            return None
        if parts[4:] not in ([], ["output"]) or not (parts[1] + parts[3]).isdigit():
            return None
        index, expert = int(parts[1]), int(parts[3])
        layer = self._map.layers[index] if index < len(self._map.layers) else None
        if layer is None or layer.moe is None:
            return None
        if expert >= layer.moe.num_experts:
            raise UsageError(
                f"{name}: decoder layer {index} has {layer.moe.num_experts} experts, 0 to "
                f"{layer.moe.num_experts - 1}"
            )
        return self._expert(layer, expert)

    def unknown(self, name: str) -> str:
        """A sentence about a name that is none."""
        layer, tail = self._split(name)
        known = [*self.points, *self._map.names]
        if layer is not None:
            known = [k for k in known if k.startswith(layer)]
        near = get_close_matches(name, known, n=NEAR, cutoff=0.4)
        beside = name.rpartition(".")[0]
        near += [k for k in known if k.rpartition(".")[0] == beside and k not in near][: 2 * NEAR]
        why = self._why(layer, tail)
        near = near or list(self.points)[:NEAR]
        model = self._map.model_type
        return f"{model} has no value {name!r}{why}; near are {', '.join(near)}"

    def _split(self, name: str) -> tuple[str | None, str]:
        parts = name.split(".")
        if parts[0] != "layers" or len(parts) < 3:
            return None, name
        return f"{parts[0]}.{parts[1]}.", ".".join(parts[2:])

    def _why(self, prefix: str | None, tail: str) -> str:
        if prefix is None:
            return ""
        layer = self._map.layers[int(prefix.split(".")[1])]
        if tail.split(".")[0] in ("router", "experts"):
            if layer.moe is None:
                return " (the layer is dense)"
            if {"gate", "up", "down", "gate_up"} & set(tail.split(".")[1:]):
                return " (stacked experts take the tokens in an order of their own)"
        if tail.startswith("attn."):
            part = tail.removeprefix("attn.")
            if part in ATTENTION_PARTS and layer.mixers:
                return f" (its mixer is a {layer.mixers[0].kind} part, which has no attention)"
            if part in ("q", "k", "v"):
                return " (no module of its own makes it; attn.queries, .keys and .values are what attention takes)"
        return ""


def called(modules: Mapping[str, nn.Module], path: str) -> str:
    """The module of a mixer that is called: exaone keeps its attention in a module of its own."""
    own = [child for child, _ in children(modules, path)]
    if len(own) == 1 and modules[own[0]].children():
        return called(modules, own[0])
    return path
