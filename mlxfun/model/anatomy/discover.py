"""Finds the MoE layers of a loaded mlx-lm model by structure.

Experts are the `SwitchGLU`/`SwitchMLP` modules (or dbrx's list of MLPs); the router is the child
named `gate` or `router` of their nearest ancestor. `named_modules()` is used instead of
`model.layers`, which many models override with their pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlxfun.errors import ModelError
from mlxfun.model.anatomy import ends, facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.model.anatomy.types import MoELayer, MoEMap, RouterKind, SlicedParameter, SlicedRole
from mlxfun.model.parameters import flatten

Modules = dict[str, nn.Module]


def discover(model: nn.Module, config: dict[str, Any]) -> MoEMap:
    """Describe every MoE layer of `model`; a dense model has none.

    Raises ModelError for architectures whose experts cannot be observed.
    """
    model_type = str(config.get("model_type", "unknown"))
    family = module_name(model)
    if family in facts.UNSUPPORTED:
        raise ModelError(
            f"{model_type} is not supported: {facts.UNSUPPORTED[family]}; load another model"
        )
    modules: Modules = dict(model.named_modules())
    found = sorted(_blocks(modules), key=lambda pair: _decoder_index(pair[1]))
    layers = tuple(
        _describe(modules, block, experts, position, config)
        for position, (block, experts) in enumerate(found)
    )
    return MoEMap(
        model_type,
        _decoder_layers(modules, layers[0].block if layers else ""),
        layers,
        _count_key(model, config, layers[0].num_experts) if layers else (),
        ends.head(modules),
        ends.vocabulary(modules, ends.embedding(modules)),
    )


def _blocks(modules: Modules) -> Iterable[tuple[str, str]]:
    """(block path, experts path) of each MoE layer, in no particular order."""
    for path, module in modules.items():
        if isinstance(module, SwitchGLU | SwitchMLP):
            block = _nearest_with_router(modules, path)
            if block is not None:
                yield block, path
        elif _has_expert_list(module):
            yield path, f"{path}.experts"


def _has_expert_list(module: nn.Module) -> bool:
    experts = module.get("experts")
    return (
        isinstance(experts, list)
        and len(experts) > 1
        and any(name in module for name in facts.ROUTER_NAMES)
    )


def _nearest_with_router(modules: Modules, path: str) -> str | None:
    # Two steps up are enough for every known layout (gemma4 keeps its router two levels higher);
    # going further would find an unrelated `gate` of an enclosing module.
    for _ in range(2):
        path = path.rpartition(".")[0]
        if path in modules and _router_name(modules[path]) is not None:
            return path
    return None


def _router_name(block: nn.Module) -> str | None:
    for name in facts.ROUTER_NAMES:
        if isinstance(block.get(name), nn.Module):
            return name
    return None


def _decoder_index(path: str) -> int:
    """The first number of a dotted path: model.layers.3.mlp -> 3."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def _decoder_layers(modules: Modules, block: str = "") -> int:
    """Length of the list of modules that holds `block`, or of the longest top list."""
    counts: dict[str, int] = {}
    for path in modules:
        parent, _, last = path.rpartition(".")
        if last.isdigit() and not any(part.isdigit() for part in parent.split(".")):
            counts[parent] = max(counts.get(parent, 0), int(last) + 1)
    for parent, count in counts.items():
        if block.startswith(f"{parent}."):
            return count
    return max(counts.values(), default=0)


def _expert_count(experts: Any) -> int:
    if isinstance(experts, list):
        return len(experts)
    first = experts.gate_proj if isinstance(experts, SwitchGLU) else experts.fc1
    return int(first.weight.shape[0])


def _describe(
    modules: Modules, block_path: str, experts_path: str, position: int, config: dict[str, Any]
) -> MoELayer:
    block = modules[block_path]
    router_path = f"{block_path}.{_router_name(block)}"
    router = modules[router_path]
    as_list = experts_path not in modules
    count = _expert_count(block["experts"] if as_list else modules[experts_path])
    kind, logits, rows = _logits_source(modules, router_path, count)
    row = facts.BLOCKS.get(module_name(block), facts.UNKNOWN)
    n_group, topk_group = _groups(row, router, block, config)
    owner, bias = _selection_bias(block_path, block, router_path, router)
    return MoELayer(
        index=_decoder_index(block_path),
        position=position,
        block=block_path,
        experts=experts_path,
        router=router_path,
        logits=logits,
        router_kind=kind,
        facts=row,
        family=module_name(block),
        num_experts=count,
        router_rows=rows,
        top_k=_top_k(router, block, config, position),
        n_group=n_group,
        topk_group=topk_group,
        bias_owner=owner,
        bias_name=bias,
        shared=tuple(
            f"{block_path}.{name}"
            for name in facts.SHARED_NAMES
            if isinstance(block.get(name), nn.Module)
        ),
        experts_list=as_list,
        parameters=tuple(_sliced(modules, block_path, experts_path, router_path, (count, rows))),
        counts=tuple(_count_attributes(modules, block_path, router_path, count, rows)),
    )


def _logits_source(modules: Modules, router_path: str, count: int) -> tuple[RouterKind, str, int]:
    """(router kind, path of the module that makes the logits, its rows)."""
    router = modules[router_path]
    if isinstance(router, nn.Linear | nn.QuantizedLinear):
        return "linear", router_path, int(router.weight.shape[0])
    for name, leaf in router.named_modules():
        if name and isinstance(leaf, nn.Linear | nn.QuantizedLinear):
            rows = int(leaf.weight.shape[0])
            if rows >= count:
                return "inner-linear", f"{router_path}.{name}", rows
    if "weight" in router and router.weight.shape[0] >= count:
        return "weight", router_path, int(router.weight.shape[0])
    raise ModelError(
        f"the router at {router_path} ({type(router).__name__}) makes its logits in a way that "
        "mlxfun does not know; please report the architecture"
    )


def _sources(*objects: Any) -> Iterable[Any]:
    """Each module and the argument objects it keeps."""
    for thing in objects:
        yield thing
        for name in ("args", "config"):
            held = getattr(thing, name, None)
            if held is not None:
                yield held


def _first_int(names: tuple[str, ...], objects: Iterable[Any]) -> int | None:
    for thing in objects:
        for name in names:
            value = thing.get(name) if isinstance(thing, dict) else None
            if value is None:
                value = getattr(thing, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _groups(
    row: facts.BlockFacts, router: nn.Module, block: nn.Module, config: dict[str, Any]
) -> tuple[int, int]:
    """(n_group, topk_group), (1, 1) for a router that selects among all experts."""
    if not row.grouped:
        return 1, 1
    # deepseek_v2 reads its group sizes only with this one method.
    method = getattr(router, "topk_method", "group_limited_greedy")
    if module_name(block) == "deepseek_v2" and method != "group_limited_greedy":
        return 1, 1
    where = [*_sources(router, block), *_nested(config)]
    n_group = _first_int(facts.GROUP_COUNT_KEYS, where) or 1
    topk_group = _first_int(facts.GROUP_TOP_KEYS, where) or n_group
    return (n_group, topk_group) if n_group > 1 else (1, 1)


def _nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        *(config[key] for key in facts.NESTED_CONFIGS if isinstance(config.get(key), dict)),
        config,
    ]


def _top_k(router: nn.Module, block: nn.Module, config: dict[str, Any], position: int) -> int:
    value = _first_int(facts.TOP_K_ATTRIBUTES, (router, block))
    if value is None:
        value = _first_int(facts.TOP_K_KEYS, (*_sources(router, block), *_nested(config)))
    if value is None:
        raise ModelError(
            f"cannot tell how many experts a token uses in MoE layer {position}: none of "
            f"{', '.join(facts.TOP_K_KEYS)} is in config.json"
        )
    return value


def _selection_bias(
    block_path: str, block: nn.Module, router_path: str, router: nn.Module
) -> tuple[str | None, str | None]:
    for path, module in ((router_path, router), (block_path, block)):
        for name in facts.SELECTION_BIASES:
            if isinstance(module.get(name), mx.array):
                return path, name
    return None, None


def _sliced(
    modules: Modules, block: str, experts: str, router: str, sizes: tuple[int, int]
) -> Iterable[SlicedParameter]:
    """Every array whose first dimension counts experts, in block, router and experts."""
    count, rows = sizes

    def rows_of(prefix: str, array: mx.array, role: SlicedRole) -> Iterable[SlicedParameter]:
        if array.ndim and array.shape[0] in {count, rows}:
            yield SlicedParameter(prefix, role, array.shape[0] - count)

    for name, value in modules[block].items():
        if isinstance(value, mx.array):
            yield from rows_of(f"{block}.{name}", value, "router")
    for name, value in flatten(modules[router].parameters()):
        # gemma4's router has a per-feature `scale`; only its length could be taken for E.
        if not (name == "scale" and "per_expert_scale" in modules[router]):
            yield from rows_of(f"{router}.{name}", value, "router")
    if experts in modules:
        for name, value in flatten(modules[experts].parameters()):
            yield from rows_of(f"{experts}.{name}", value, "expert")


def _count_attributes(
    modules: Modules, block: str, router: str, count: int, rows: int
) -> Iterable[tuple[str, str]]:
    for path in dict.fromkeys((block, router)):
        for name in facts.EXPERT_COUNT_KEYS:
            value = vars(modules[path]).get(name)
            if isinstance(value, int) and value in {count, rows}:
                yield path, name


def _count_key(model: nn.Module, config: dict[str, Any], count: int) -> tuple[str, ...]:
    """Path of the key that holds the expert count: where several do, the one that is read."""
    found = list(_count_keys(config, count))
    read = {key for key in facts.EXPERT_COUNT_KEYS if _reads(model, key, count)}
    for path in found:
        if path[-1] in read:
            return path
    if found:
        return found[0]
    # The checkpoint relies on a default of the model's argument class: find the field's name.
    for key in facts.EXPERT_COUNT_KEYS:
        if key in read:
            return (key,)
    raise ModelError(
        f"config.json has no key that equals the {count} experts found in the weights "
        f"(looked for {', '.join(facts.EXPERT_COUNT_KEYS)})"
    )


def _reads(model: nn.Module, key: str, count: int) -> bool:
    """Whether the arguments that the model keeps have the count under this name."""
    held = (args for _, module in model.named_modules() for args in _sources(module))
    return any(
        getattr(args, key, None) == count for args in held if not isinstance(args, nn.Module)
    )


def _count_keys(config: dict[str, Any], count: int) -> Iterator[tuple[str, ...]]:
    for prefix in (*((key,) for key in facts.NESTED_CONFIGS), ()):
        node = config.get(prefix[0]) if prefix else config
        if not isinstance(node, dict):
            continue
        for key in facts.EXPERT_COUNT_KEYS:
            if node.get(key) == count:
                yield (*prefix, key)
