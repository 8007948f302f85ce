"""What of a model stays on disk while it is loaded: some of its experts, or its decoder layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxfun.model.model_map import map_model
from mlxfun.model.parameters import flatten

if TYPE_CHECKING:
    from mlxfun.checkpoint.headers import Header
    from mlxfun.checkpoint.identity import Stamp

HALF = (mx.bfloat16, mx.float16)


@dataclass(frozen=True, slots=True)
class Lazy:
    """A model of which nothing is read yet. estimate: bytes it would take. cast: whether 16-bit
    weights will be held in 32. headers: of the files with weights; files: their stamps."""

    model: nn.Module
    config: dict[str, Any]
    headers: list[Header]
    files: tuple[Stamp, ...]
    estimate: int
    cast: bool


LeaveOnDisk = Callable[[Lazy], frozenset[str]]
"""Which parameters are not to be read, of which the model gets placeholders; checks that the others
fit in memory."""


@dataclass(frozen=True, slots=True)
class LayersOnDisk:
    """No decoder layer is in memory but the one that runs. scratch: a directory for hidden states
    and edited tensors; the system's by default."""

    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))


def set_aside(lazy: Lazy, on_disk: frozenset[str]) -> None:
    """Put placeholders where parameters stay on disk: they take no memory, and what is computed
    with one by mistake is not a number, and is noticed."""
    placeholders = []
    for path, array in flatten(lazy.model.parameters()):
        if path in on_disk:
            dtype = _held_as(lazy, array)
            worthless = float("nan") if mx.issubdtype(dtype, mx.floating) else 0
            stands_in = mx.broadcast_to(mx.array(worthless, dtype), array.shape)
            placeholders.append(stands_in)
            lazy.model.update(tree_unflatten([(path, stands_in)]))
    mx.eval(placeholders)


def layer_parameters(lazy: Lazy) -> frozenset[str]:
    """The parameters of decoder layers."""
    layers = tuple(f"{layer.path}." for layer in map_model(lazy.model, lazy.config).layers)
    return frozenset(
        path for path, _ in flatten(lazy.model.parameters()) if path.startswith(layers)
    )


def streamed_bytes(lazy: Lazy, unread: frozenset[str]) -> int:
    """Bytes in memory while the largest decoder layer runs, besides what runs through it.

    unread: the parameters of decoder layers.
    """
    rest, layers = 0, dict[str, int]()
    for path, array in flatten(lazy.model.parameters()):
        size = array.size * _held_as(lazy, array).size
        if path not in unread:
            rest += size
            continue
        place = next(i for i, part in enumerate(path.split(".")) if part.isdigit())
        layer = ".".join(path.split(".")[: place + 1])
        layers[layer] = layers.get(layer, 0) + size
    return rest + max(layers.values(), default=0)


def widen(lazy: Lazy, unread: frozenset[str]) -> None:
    """Cast parameters that are not read yet as they will be held; the cast is not made yet either."""
    wide = [
        (path, array.astype(_held_as(lazy, array)))
        for path, array in flatten(lazy.model.parameters())
        if path in unread and array.dtype != _held_as(lazy, array)
    ]
    lazy.model.update(tree_unflatten(wide))


def _held_as(lazy: Lazy, array: mx.array) -> mx.Dtype:
    return mx.float32 if lazy.cast and array.dtype in HALF else array.dtype
