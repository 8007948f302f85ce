"""What distillation trains: float32 copies of some parameters, and how they get into the model.

A packed router is trained as the matrix that its packed values stand for, and packed again when it
is staged. Selection biases stay: the choice of experts has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxfun.errors import PlanError
from mlxfun.model.delta import Delta, LayerDelta, Resident
from mlxfun.model.experts import Bank
from mlxfun.model.identity import RowId, Rows
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.model_map import ModelMap
from mlxfun.model.parameters import dequantised, rounded, row_digests, whole_digest
from mlxfun.model.router_edit import RouterEdit
from mlxfun.techniques.distil.options import Train
from mlxfun.techniques.workspace import ResidentModel

Kind = Literal["router", "expert", "norm"]
Masters = dict[str, mx.array]
"""{path: float32 array in training}."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A parameter in training. layer: of the decoder, None for the norm ahead of the head; position:
    of its MoE layer. packed: the path is that of the weight of a packed router.
    """

    path: str
    kind: Kind
    layer: int | None
    position: int | None = None
    packed: bool = False

    @property
    def module(self) -> str:
        """The path of the module that holds it."""
        return self.path.rpartition(".")[0]


def variables(found: ModelMap, resident: Resident, train: Train) -> tuple[Variable, ...]:
    """What is trained, in the order of the layers. Raises PlanError for experts that cannot be."""
    chosen = [v for moe in resident.layers for v in _router(moe, resident)]
    if train == "moe":
        chosen += [v for moe in resident.layers for v in _experts(moe, resident)]
        chosen += _norms(found, resident)
    last = found.layers[-1].index + 1
    return tuple(sorted(chosen, key=lambda v: last if v.layer is None else v.layer))


def _router(moe: LiveExperts, resident: Resident) -> list[Variable]:
    layer, modules = moe.layer, resident.tree.modules
    packed = "scales" in modules[layer.logits]
    inside = {f"{layer.logits}.{name}" for name in ("scales", "biases", "global_scale")}
    skipped = inside | {f"{layer.bias_owner}.{layer.bias_name}"}
    return [
        Variable(p.path, "router", layer.index, layer.position,
                 packed and p.path == f"{layer.logits}.weight")
        for p in layer.router_parameters() if p.path not in skipped
    ]  # fmt: skip


def _experts(moe: LiveExperts, resident: Resident) -> list[Variable]:
    layer = moe.layer
    bank = Bank.of(moe, resident.tree.modules)
    if any("scales" in bank.projection(name) for name in bank.names):
        raise PlanError(
            f"the experts of layer {layer.index} are packed, and packed weights have no gradient; "
            "use --train router, or distil the floating-point model and save it with --quantize"
        )
    paths = [p.path for p in layer.expert_parameters()]
    return [Variable(path, "expert", layer.index, layer.position) for path in paths]


def _norms(found: ModelMap, resident: Resident) -> list[Variable]:
    wanted = [
        (layer.index, path)
        for layer in found.layers
        for path in (*layer.norm1, *layer.norm2, *layer.post_norm1, *layer.post_norm2)
    ]
    at_end = [(None, found.norm)] if found.norm else []
    paths, out = set(resident.tree.paths), []
    for index, path in [*wanted, *at_end]:
        if f"{path}.weight" in paths:
            out.append(Variable(f"{path}.weight", "norm", index))
    return out


def masters_of(wanted: Sequence[Variable], resident: Resident) -> Masters:
    """The parameters as they are now, float32, evaluated."""
    modules = resident.tree.modules
    found = {
        v.path: dequantised(modules[v.module])
        if v.packed
        else resident.tree.get(v.path).astype(mx.float32)
        for v in wanted
    }
    mx.eval(found)
    return found


def trained_delta(
    workspace: ResidentModel, wanted: Sequence[Variable], masters: Mapping[str, mx.array]
) -> Delta:
    """What the masters change, each value rounded to, or packed in, what it is stored in. The state
    that was trained must be live. What comes out as it was is left out.
    """
    layers: list[LayerDelta] = []
    for index in dict.fromkeys(v.layer for v in wanted):
        here = [v for v in wanted if v.layer == index]
        arrays: dict[str, mx.array] = {}
        rows: dict[str, Rows | None] = {}
        for v in here:
            for path, array in _stored_arrays(workspace, v, masters[v.path]).items():
                held = workspace.resident.tree.get(path)
                if not mx.array_equal(array, held).item():
                    arrays[path], rows[path] = array, _identity(workspace, v, path, array)
        if arrays:
            position = next((v.position for v in here if v.position is not None), None)
            layers.append(_layer(workspace.resident, position, arrays, rows))
    return Delta(tuple(layers))


def _stored_arrays(workspace: ResidentModel, v: Variable, master: mx.array) -> dict[str, mx.array]:
    if v.packed:
        module: Any = workspace.resident.tree.modules[v.module]
        new = RouterEdit(workspace.resident, workspace.stored).weights(module, v.module, master)
        # Packing the rows that did not move again could move their last bit.
        moved = mx.any(master != dequantised(module), axis=-1)[:, None]
        old = {path: module[path.rpartition(".")[2]] for path in new}
        rows = all(a.ndim == 2 and a.shape[0] == master.shape[0] for a in old.values())
        return {p: mx.where(moved, a, old[p]) for p, a in new.items()} if rows else new
    held = workspace.resident.tree.get(v.path)
    return {v.path: rounded(master, workspace.stored(v.path), held.dtype)}


def _identity(workspace: ResidentModel, v: Variable, path: str, array: mx.array) -> Rows:
    """Rows of experts have an identity each, and those that stayed keep theirs; norms have one."""
    resident, stored = workspace.resident, workspace.stored(path)
    if v.kind == "norm" or not array.ndim:
        return Rows.of([whole_digest(array, stored)])
    held, known = resident.tree.get(path), resident.ledger.get(path)
    count = array.shape[0]
    rows: Sequence[int] = range(count)
    if v.kind == "expert" and v.position is not None:
        rows = resident.layers[v.position].rows
    ids: list[RowId] = list(known.ids) if known is not None else list(range(len(rows)))
    same = np.array(mx.all((array == held).reshape(count, -1), axis=1))
    moved = [place for place, row in enumerate(rows) if not same[row]]
    picked = mx.array(np.array([rows[place] for place in moved], np.uint32))
    for place, digest in zip(
        moved, row_digests(array[picked], stored) if moved else (), strict=True
    ):
        ids[place] = digest
    return Rows.of(ids)


def _layer(
    resident: Resident,
    position: int | None,
    arrays: dict[str, mx.array],
    rows: dict[str, Rows | None],
) -> LayerDelta:
    made = frozenset(arrays)
    mx.eval(list(arrays.values()))
    if position is None:
        return LayerDelta(None, arrays=arrays, rows=rows, made=made)
    live, stack = resident.layers[position].live, resident.stack[position]
    return LayerDelta(position, live, stack, arrays=arrays, rows=rows, made=made)
