"""Data types of a discovered MoE layer: frozen, without arrays, safe to pass between threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlxfun.model.anatomy.facts import EXPERT_COUNT_KEYS, NESTED_CONFIGS, BlockFacts, MixerKind

SlicedRole = Literal["router", "expert"]
"""Router arrays are small, and sliced at once by a prune; experts only by compact and save."""

RouterKind = Literal["linear", "inner-linear", "weight"]
"""The router is the Linear; a module around a Linear; a module that multiplies its own weight."""


@dataclass(frozen=True, slots=True)
class SlicedParameter:
    """A parameter whose first dimension counts experts.

    tail: trailing rows that belong to no expert and are always kept (longcat's zero experts).
    """

    path: str
    role: SlicedRole
    tail: int = 0


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer. Paths are those of `model.named_modules()`; counts are the checkpoint's.

    index: decoder layer; position: 0..L-1 among MoE layers.
    logits: path of the module that makes the logits.
    bias_owner/bias_name: where the selection bias lives, or None.
    experts_list: the experts are a Python list of modules (dbrx) instead of stacked tensors.
    counts: (module path, attribute) pairs that hold the expert count at run time.
    """

    index: int
    position: int
    block: str
    experts: str
    router: str
    logits: str
    router_kind: RouterKind
    facts: BlockFacts
    family: str
    num_experts: int
    router_rows: int
    top_k: int
    n_group: int
    topk_group: int
    bias_owner: str | None
    bias_name: str | None
    shared: tuple[str, ...]
    experts_list: bool
    parameters: tuple[SlicedParameter, ...]
    counts: tuple[tuple[str, str], ...]

    @property
    def grouped(self) -> bool:
        """Selection is restricted to some groups of experts."""
        return self.n_group > 1

    def router_parameters(self) -> tuple[SlicedParameter, ...]:
        """The small arrays that a prune slices at once."""
        return tuple(p for p in self.parameters if p.role == "router")

    def expert_parameters(self) -> tuple[SlicedParameter, ...]:
        """The large arrays that compact and save slice."""
        return tuple(p for p in self.parameters if p.role == "expert")


@dataclass(frozen=True, slots=True)
class Head:
    """The output head. path: its module; tied: called through `as_linear` of the embedding."""

    path: str
    tied: bool


@dataclass(frozen=True, slots=True)
class Mixer:
    """The part of a decoder layer that mixes tokens."""

    path: str
    kind: MixerKind


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer, MoE or not, by the paths of its parts. Most have one of each.

    mixers: attention first. mlps: the MoE block, if it is not the layer itself (gemma4), then dense
    feed-forward parts. shared: shared experts. norm1/norm2: of what enters mixer and MLP;
    post_norm1/post_norm2: of what leaves them. moe: its experts, None in a dense layer.
    """

    index: int
    path: str
    mixers: tuple[Mixer, ...]
    mlps: tuple[str, ...]
    shared: tuple[str, ...]
    norm1: tuple[str, ...]
    norm2: tuple[str, ...]
    post_norm1: tuple[str, ...]
    post_norm2: tuple[str, ...]
    moe: MoELayer | None


@dataclass(frozen=True, slots=True)
class MoEMap:
    """All MoE layers of a model, and the config key that holds their expert count.

    A dense model has no layers here, no experts and no key. count_key: path into config.json, for instance ("text_config", "num_experts"). vocabulary: rows
    of the token embedding, None where none was found.
    """

    model_type: str
    decoder_layers: int
    layers: tuple[MoELayer, ...]
    count_key: tuple[str, ...]
    head: Head | None
    vocabulary: int | None = None

    @property
    def num_experts(self) -> int:
        """E, the widest layer's expert count (all layers agree in every known model)."""
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def top_k(self) -> int:
        """K, the largest of any layer."""
        return max((layer.top_k for layer in self.layers), default=0)

    @property
    def indices(self) -> tuple[int, ...]:
        """Decoder index of each MoE layer, [L]."""
        return tuple(layer.index for layer in self.layers)

    def position_of(self, decoder_layer: int) -> int | None:
        """Position 0..L-1 of a decoder layer, None if it is not an MoE layer."""
        for layer in self.layers:
            if layer.index == decoder_layer:
                return layer.position
        return None

    def with_count(self, config: dict[str, Any], experts: int) -> dict[str, Any]:
        """A deep enough copy of `config` whose expert count is `experts`, under every name.

        Some converters write the count under the names of several architectures: all keys that
        hold the count of the checkpoint change, beside the one that is read.
        """
        new = _renumbered(config, self.num_experts, experts)
        node = new
        for key in self.count_key[:-1]:
            node[key] = dict(node.get(key, {}))
            node = node[key]
        node[self.count_key[-1]] = experts
        return new


def _counted(value: Any, old: int, new: int) -> Any:
    """A count, or one a layer, that holds `old` everywhere; another value stays."""
    if isinstance(value, list) and value and all(one == old for one in value):
        return [new] * len(value)
    return new if value == old else value


def _renumbered(config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """`config` with `new` under every name of the expert count that holds `old`, nested ones too."""
    found = {k: _counted(v, old, new) if k in EXPERT_COUNT_KEYS else v for k, v in config.items()}
    for key in NESTED_CONFIGS:
        if isinstance(config.get(key), dict):
            found[key] = _renumbered(config[key], old, new)
    return found
