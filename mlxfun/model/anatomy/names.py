"""Canonical names: one vocabulary for the parts of every architecture.

`embed`, `norm`, `head`, and per decoder layer `layers.3` with `.attn` (`.q`, `.k`, `.v` or `.qkv`,
`.output`, `.q_norm`, `.k_norm`, `.conv`), `.mlp` (`.gate`, `.up` or `.gate_up`, `.down`), `.norm1`
and `.norm2` (of what enters attn and mlp), `.post_norm1` and `.post_norm2` (of what leaves them),
`.router`, `.experts` (the stacks `.gate`, `.up`, `.down`; `.experts.5.down` where experts are a
list), `.shared`. The second of a kind in one layer is `attn_2`, `mlp_2`, ... Everything else keeps
its own path as its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import children
from mlxfun.model.anatomy.types import DecoderLayer

Modules = Mapping[str, nn.Module]


def numbered(name: str, index: int) -> str:
    """The name of the first, second, ... of a kind: attn, attn_2, attn_3."""
    return name if index == 0 else f"{name}_{index + 1}"


class _Names:
    """{path: name} and {name: path} while they are given; the first name of a path stays."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.paths: dict[str, str] = {}
        self._named: set[str] = set()

    def give(self, name: str, path: str | None) -> None:
        if path is None or path not in self.modules or path in self._named:
            return
        if name not in self.paths:
            self.paths[name] = path
            self._named.add(path)

    def number(self, name: str, paths: Iterable[str]) -> list[tuple[str, str]]:
        """Give several paths of one kind their names; [(name, path)]."""
        named = [(numbered(name, i), path) for i, path in enumerate(paths)]
        for each, path in named:
            self.give(each, path)
        return named

    def rest(self) -> None:
        """Whatever has no role is called by its path."""
        for path in self.modules:
            if path and path not in self._named:
                # A path that reads like another module's name is told apart by a dot.
                self.give(path if path not in self.paths else f".{path}", path)


def canonical_names(
    modules: Modules, layers: Iterable[DecoderLayer], ends: Mapping[str, str | None]
) -> dict[str, str]:
    """{canonical name: path} of every module but the model itself.

    ends: paths of `embed`, `norm` and `head`. A tied head is the embedding, and named as that.
    """
    names = _Names(modules)
    for name, path in ends.items():
        names.give(name, path)
    for layer in layers:
        _name_layer(names, layer)
    names.rest()
    return names.paths


def _name_layer(names: _Names, layer: DecoderLayer) -> None:
    prefix = f"layers.{layer.index}"
    names.give(prefix, layer.path)
    for name, path in names.number(f"{prefix}.attn", (mixer.path for mixer in layer.mixers)):
        _name_mixer(names, name, path)
    for name, path in names.number(f"{prefix}.mlp", layer.mlps):
        _name_mlp(names, name, path)
    for name, path in names.number(f"{prefix}.shared", layer.shared):
        _name_mlp(names, name, path)
    for role in ("norm1", "norm2", "post_norm1", "post_norm2"):
        names.number(f"{prefix}.{role}", getattr(layer, role))
    if layer.moe is not None:
        names.give(f"{prefix}.router", layer.moe.router)
        experts = f"{prefix}.experts"
        names.give(experts, layer.moe.experts)
        _name_mlp(names, experts, layer.moe.experts)
        if layer.moe.experts_list:
            for number in range(layer.moe.num_experts):
                path = f"{layer.moe.experts}.{number}"
                names.give(f"{experts}.{number}", path)
                _name_mlp(names, f"{experts}.{number}", path)


def _name_mixer(names: _Names, name: str, path: str) -> None:
    own = {attribute: child for child, attribute in children(names.modules, path)}
    if len(own) == 1:  # exaone keeps its attention in a module of its own
        _name_mixer(names, name, next(iter(own.values())))
    for role, known in facts.MIXER_ROLES.items():
        for attribute in known:
            names.give(f"{name}.{role}", own.get(attribute))


def _name_mlp(names: _Names, name: str, path: str) -> None:
    own = {attribute: child for child, attribute in children(names.modules, path)}
    for row in facts.MLP_ROLES:
        if all(attribute in own for attribute in row.values()):
            for role, attribute in row.items():
                fused = role == "up" and _is_fused(names.modules, own, row)
                names.give(f"{name}.{'gate_up' if fused else role}", own[attribute])
            return


def _is_fused(modules: Modules, own: Mapping[str, str], row: Mapping[str, str]) -> bool:
    """Whether `up` holds the gate too: it then puts out twice what `down` takes."""
    if "gate" in row:
        return False
    rows = modules[own[row["up"]]].get("weight")
    down = modules[own[row["down"]]]
    if not isinstance(rows, mx.array) or not isinstance(down.get("weight"), mx.array):
        return False
    return int(rows.shape[-2]) == 2 * columns_of(down)


def columns_of(module: nn.Module) -> int:
    """Columns of a Linear, switched or not, unpacked."""
    bits = getattr(module, "bits", None)
    columns = int(module.weight.shape[-1])
    return columns * 32 // int(bits) if bits is not None else columns
