"""Finds the decoder layers of any mlx-lm model, and in each its mixer, feed-forward part and norms.

A decoder layer is an item of a list of modules outside any other list; what is in it is told by
the names and classes of its children (tables in `facts`) and by what was found of its experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import mlx.nn as nn

from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.types import DecoderLayer, Mixer, MoELayer, MoEMap

Modules = Mapping[str, nn.Module]


def module_name(module: nn.Module) -> str:
    """The last part of the name of the Python module that defines a module's class."""
    return type(module).__module__.rpartition(".")[2]


def in_order(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of a model, siblings in the order in which the model made them."""
    return dict(reversed(list(model.named_modules())))


def decoder_layers(modules: Modules, moe: MoEMap) -> tuple[DecoderLayer, ...]:
    """Every decoder layer, MoE or not, in the order in which the model's lists hold them.

    modules: as `in_order` gives them. moe: what was found of their experts. A model with two lists
    of layers (afm7) has one after the other.
    """
    found: list[DecoderLayer] = []
    for paths in _lists(modules):
        layers = [
            _describe(modules, path, len(found) + i, moe.layers) for i, path in enumerate(paths)
        ]
        if any(layer.mixers or layer.mlps or layer.moe for layer in layers):
            found += layers
    return tuple(found)


def layer_paths(modules: Modules) -> tuple[str, ...]:
    """Paths of all items of lists of modules outside any other list: decoder layers and the like.

    Needs nothing but the modules, so also of a model that is being looked at for the first time.
    """
    return tuple(path for paths in _lists(modules) for path in paths)


def _lists(modules: Modules) -> Iterable[list[str]]:
    """Paths of the items of each list of modules that have modules of their own, by number."""
    parents = {path.rpartition(".")[0] for path in modules}
    lists: dict[str, list[tuple[int, str]]] = {}
    for path in modules:
        parent, _, last = path.rpartition(".")
        nested = any(part.isdigit() for part in parent.split("."))
        if last.isdigit() and not nested and path in parents:
            lists.setdefault(parent, []).append((int(last), path))
    return ([path for _, path in sorted(items)] for items in lists.values())


@dataclass(slots=True)
class _Parts:
    """What was found in one layer so far: paths by role."""

    mixers: list[Mixer] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    norms: dict[str, list[str]] = field(default_factory=dict)


def _describe(
    modules: Modules, path: str, index: int, experts: tuple[MoELayer, ...]
) -> DecoderLayer:
    moe = next((ly for ly in experts if f"{ly.block}.".startswith(f"{path}.")), None)
    parts = _Parts()
    if moe is not None:
        parts.shared += moe.shared
        if moe.block != path:
            parts.mlps.append(moe.block)
    _visit(modules, path, moe, parts)
    norms = _norm_roles(parts.norms)
    # Attention first: where a layer has two mixers side by side, `attn` is the attention.
    mixers = sorted(parts.mixers, key=lambda mixer: mixer.kind != "attention")
    return DecoderLayer(
        index=index,
        path=path,
        mixers=tuple(mixers),
        mlps=tuple(parts.mlps),
        shared=tuple(parts.shared),
        norm1=norms["norm1"],
        norm2=norms["norm2"],
        post_norm1=norms["post_norm1"],
        post_norm2=norms["post_norm2"],
        moe=moe,
    )


def _visit(modules: Modules, path: str, moe: MoELayer | None, parts: _Parts) -> None:
    """Sort the children of `path` into `parts`; look into those that are nothing by themselves."""
    for child, name in children(modules, path):
        if moe is not None and _of_experts(child, moe):
            continue
        module = modules[child]
        if moe is not None and name.startswith("share"):
            parts.shared.append(child)
        elif _is_norm(module):
            parts.norms.setdefault(name, []).append(child)
        elif name in facts.MLP_NAMES or "mlp" in type(module).__name__.lower():
            parts.mlps.append(child)
        elif name in facts.MIXER_NAMES:
            parts.mixers.append(Mixer(child, _kind(module)))
        else:
            _visit(modules, child, moe, parts)


def _of_experts(path: str, moe: MoELayer) -> bool:
    """Whether a module is the MoE block, its router or its experts, or holds the experts."""
    return path in {moe.block, moe.router} or f"{moe.experts}.".startswith(f"{path}.")


def children(modules: Modules, path: str) -> Iterator[tuple[str, str]]:
    """(path, attribute name) of the direct child modules of `path`, those in its lists included."""
    prefix = f"{path}."
    for child in modules:
        if child.startswith(prefix):
            name, _, rest = child[len(prefix) :].partition(".")
            if not rest or rest.isdigit():
                yield child, name


def _is_norm(module: nn.Module) -> bool:
    """A leaf called a norm; dbrx calls a module that holds the attention by such a name."""
    return not module.children() and type(module).__name__.lower().endswith(("norm", "norm1p"))


def _kind(module: nn.Module) -> facts.MixerKind:
    name = type(module).__name__.lower()
    for kind, words in facts.MIXER_KINDS:
        if any(word in name for word in words):
            return kind
    return "attention"


def _norm_roles(norms: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Paths by canonical role, from paths by attribute name."""
    names = {
        "norm1": list(facts.FIRST_NORMS),
        "norm2": list(facts.SECOND_NORMS),
        "post_norm1": list(facts.FIRST_POST_NORMS),
        "post_norm2": list(facts.SECOND_POST_NORMS),
    }
    occupied = (*facts.SECOND_NORMS, "post_feedforward_layernorm")
    behind = any(name in norms for name in occupied)
    names["post_norm1" if behind else "norm2"].append(facts.AMBIGUOUS_NORM)
    return {
        role: tuple(path for name in known for path in norms.get(name, ()))
        for role, known in names.items()
    }
