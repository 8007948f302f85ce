"""Which config keys decide how many neurons an expert has.

Found by building the model's own class, lazily, with another value of a key and looking at which
parameters change their shape. So what is found is what stock loading will do with the config that
is saved, for architectures that nobody has listed here too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlxfun.errors import PlanError
from mlxfun.model.anatomy.types import MoEMap

Key = tuple[str, ...]
"""Path into config.json."""

Shapes = Mapping[str, tuple[int, ...]]

# What model classes raise on values that they do not take.
_BUILD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class WidthKeys:
    """width: the key that holds the neurons of an expert. shared: how many times that a shared
    expert is wide, where the key sizes it too; None where it has a width of its own. same: whether
    MLPs beside the experts have to be exactly as wide."""

    width: Key
    shared: Key | None = None
    same: bool = False

    def written(self, config: dict[str, Any], width: int, shared: int | None) -> dict[str, Any]:
        """A copy of `config` with experts of `width` neurons; shared: width of the shared expert, a
        multiple of it, None where there is none or it does not change."""
        new = _put(config, self.width, width)
        if self.shared is not None and shared is not None:
            new = _put(new, self.shared, shared // width)
        return new


def width_keys(
    config: dict[str, Any], anatomy: MoEMap, width: int, along: Collection[str] = ()
) -> WidthKeys:
    """The keys for a model whose experts have `width` neurons.

    along: paths of MLPs beside the experts that become as narrow as they. Raises PlanError where no
    key sizes the experts, or where it sizes other parts as well that cannot be made up for by
    another key.
    """
    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    before = _shapes(plain)
    experts = {p.path for layer in anatomy.layers for p in layer.expert_parameters()}
    shared = {path for layer in anatomy.layers for path in layer.shared}
    follow = set(along)
    reasons: list[str] = []
    for key in _places(plain, width):
        changed = _changed(before, _put(plain, key, 2 * width))
        sized = {path for path in changed if path in experts}
        if not _weights(experts, before) <= sized:
            continue
        others = {path for path in changed - sized if not _inside(path, shared | follow)}
        if others and _is_residual(others, before):
            continue
        if others:
            reasons.append(f"{'.'.join(key)} also sizes {min(others)}")
            continue
        if changed == sized:
            return WidthKeys(key)
        count = _count_key(plain, before, changed - sized)
        if count is not None:
            return WidthKeys(key, count)
        if all(_inside(path, follow) for path in changed - sized):
            return WidthKeys(key, same=True)
        reasons.append(f"{'.'.join(key)} also sizes the shared expert {min(changed - sized)}")
    why = "; ".join(reasons) or f"no key of config.json holds their {width} neurons"
    remedy = (
        "narrow those too (--shared, --dense), or prune or merge"
        if reasons
        else ("prune or merge instead")
    )
    raise PlanError(
        f"the experts of {anatomy.model_type} cannot be narrowed alone: {why}; {remedy}"
    )


def mlp_key(config: dict[str, Any], mlps: Collection[str], width: int, what: str) -> Key:
    """The key that holds the neurons of the MLPs at the paths `mlps`, and sizes nothing else.

    what: their name in a sentence. Raises PlanError where there is none.
    """
    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    before, inside = _shapes(plain), set(mlps)
    reasons: list[str] = []
    for key in _places(plain, width):
        changed = _changed(before, _put(plain, key, 2 * width))
        others = {path for path in changed if not _inside(path, inside)}
        reached = {mlp for mlp in inside if any(_inside(path, {mlp}) for path in changed)}
        if reached == inside and not others:
            return key
        if reached and not (others and _is_residual(others, before)):
            reasons.append(f"{'.'.join(key)} also sizes {min(others)}" if others else
                           f"{'.'.join(key)} does not size {min(inside - reached)}")  # fmt: skip
    why = "; ".join(reasons) or f"no key of config.json holds their {width} neurons"
    raise PlanError(f"{what} cannot be narrowed: {why}; leave them as they are")


def with_value(config: dict[str, Any], key: Key, value: int) -> dict[str, Any]:
    """A copy of `config` with another value at a key."""
    return _put(config, key, value)


def _count_key(plain: dict[str, Any], before: Shapes, wanted: set[str]) -> Key | None:
    """The key that multiplies the width of the shared experts `wanted`, and sizes nothing else."""
    for key, value in _numbers(plain):
        if "shared" not in key[-1] or not 1 <= value <= 64:
            continue
        if _changed(before, _put(plain, key, value + 1)) == wanted:
            return key
    return None


def _weights(experts: set[str], before: Shapes) -> set[str]:
    """Of the experts' parameters, those whose shape the model's class decides."""
    return {path for path in experts if path.endswith(".weight") and path in before}


def _is_residual(others: set[str], before: Shapes) -> bool:
    """Whether what changed is the width of the residual stream, whose size happens to be the same."""
    return any(
        "embed" in path or "norm" in path or "lm_head" in path for path in others & set(before)
    )


def _inside(path: str, modules: set[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def _changed(before: Shapes, config: dict[str, Any]) -> set[str]:
    """Parameters that have another shape, or came, or went; all of them where nothing is built."""
    try:
        after = _shapes(config)
    except _BUILD_ERRORS:
        return set(before)
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the model that `config` makes; nothing is evaluated."""
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    parameters: Any = tree_flatten(model.parameters())
    return {path: tuple(array.shape) for path, array in parameters}


def _places(config: dict[str, Any], value: int) -> Iterator[Key]:
    return (key for key, found in _numbers(config) if found == value)


def _numbers(config: dict[str, Any], path: Key = ()) -> Iterator[tuple[Key, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value


def _put(config: dict[str, Any], key: Key, value: int) -> dict[str, Any]:
    new = dict(config)
    new[key[0]] = value if len(key) == 1 else _put(config[key[0]], key[1:], value)
    return new
