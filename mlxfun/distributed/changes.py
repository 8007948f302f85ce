"""What the live weights differ by from the checkpoint, as a message: so that workers follow edits.

Rows that are in the checkpoint are named, not sent: a prune is kilobytes at any size, and of an
edit that made tensors those are sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.distributed.frames import Frame
from mlxfun.errors import StateError
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import Delta, LayerDelta, Resident
from mlxfun.model.identity import Rows
from mlxfun.model.places import FromCheckpoint, Source

if TYPE_CHECKING:
    from mlxfun.arrays import Array

_BITS = {mx.bfloat16: mx.uint16, mx.float16: mx.uint16}


def changes(resident: Resident, state: str) -> Frame:
    """The frame that makes a worker's model `state`, the one that is live here.

    Raises StateError for lists of modules that were cut (dbrx after compact).
    """
    arrays: dict[str, Array] = {}
    layers = []
    left = dict(resident.ledger)
    for moe in resident.layers:
        layer, stack = moe.layer, resident.stack[moe.layer.position]
        whole = stack == tuple(range(layer.num_experts))
        if layer.experts_list and not whole:
            raise StateError(
                "workers cannot follow a model whose experts are a list of modules and were cut "
                "(compact); undo it, or stop the workers"
            )
        paths = [p.path for p in layer.parameters]
        mine = {path: left.pop(path) for path in (*paths, layer.experts) if path in left}
        if not mine:
            continue
        described = _layer(resident, mine, arrays)
        described |= {
            "position": layer.position,
            "live": list(moe.live),
            "resident": list(stack),
            "counts": [[*key, resident.tree.get_attribute(*key)] for key in layer.counts],
            "cut": [] if whole else _uncut(resident, layer),
        }
        layers.append(described)
    if left:
        layers.append(_layer(resident, left, arrays) | {"position": None})
    return Frame("become", {"layers": layers, "state": state}, arrays)


def _uncut(resident: Resident, layer: MoELayer) -> list[str]:
    """Expert stacks of which the worker takes the checkpoint's rows itself."""
    return [p.path for p in layer.expert_parameters() if p.path not in resident.made]


def _layer(resident: Resident, rows: dict[str, Rows], arrays: dict[str, Array]) -> dict[str, Any]:
    """Rows and, where an edit made it, the array of each parameter."""
    described: dict[str, Any] = {"rows": {}, "dtypes": {}}
    for path, found in rows.items():
        described["rows"][path] = list(found.ids)
        if path in resident.made:
            array = resident.tree.get(path)
            described["dtypes"][path] = str(array.dtype).rpartition(".")[2]
            kept = _BITS.get(array.dtype)
            arrays[path] = np.array(array if kept is None else array.view(kept))
    return described


def delta_of(frame: Frame) -> Delta:
    """The delta, over the checkpoint, that a frame of `changes` describes."""
    return Delta(tuple(_layers(frame)))


def _layers(frame: Frame) -> Iterator[LayerDelta]:
    for described in frame.data["layers"]:
        made = described["dtypes"]
        arrays: dict[str, Source] = {
            path: _restored(frame.arrays[path], name) for path, name in made.items()
        }
        stack = tuple(described.get("resident", ()))
        arrays |= {path: FromCheckpoint(stack) for path in described.get("cut", ())}
        yield LayerDelta(
            position=described["position"],
            live=tuple(described.get("live", ())),
            resident=stack,
            arrays=arrays,
            rows={path: Rows.of(ids) for path, ids in described["rows"].items()},
            counts={(path, name): n for path, name, n in described.get("counts", ())},
            made=frozenset(made),
        )


def _restored(array: Array, name: str) -> mx.array:
    dtype: mx.Dtype = getattr(mx, name)
    found = mx.array(array)
    return found.view(dtype) if dtype in _BITS else found
