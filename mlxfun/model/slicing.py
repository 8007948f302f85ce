"""Deltas that keep some experts of a layer: router sliced, expert stacks unchanged or sliced
too.
"""

from __future__ import annotations

from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import Delta, LayerDelta, Resident
from mlxfun.model.identity import RowId, Rows
from mlxfun.model.parameters import take_rows
from mlxfun.model.places import FromResident


def prune_layer(
    resident: Resident, layer: MoELayer, live: tuple[int, ...], keep: tuple[int, ...]
) -> LayerDelta:
    """Keep `keep` of the `live` experts of one layer: a sliced router over the same stacks."""
    where = {expert: row for row, expert in enumerate(live)}
    picked = [where[expert] for expert in keep]
    arrays = {
        p.path: take_rows(resident.fresh(p.path), picked, p.tail) for p in layer.router_parameters()
    }
    paths = [(p.path, p.tail) for p in layer.parameters]
    if layer.experts_list:
        paths.append((layer.experts, 0))
    rows: dict[str, Rows | None] = {}
    made: dict[tuple[Rows | None, int], Rows | None] = {}
    for path, tail in paths:
        # A layer's parameters nearly always hold the same rows: hash those once.
        before = resident.ledger.get(path)
        if (before, tail) not in made:
            made[before, tail] = _kept_rows(before, layer.num_experts + tail, picked, tail)
        rows[path] = made[before, tail]
    gone = len(live) - len(keep)
    return LayerDelta(
        position=layer.position,
        live=keep,
        resident=resident.stack[layer.position],
        arrays=arrays,
        rows=rows,
        counts={key: resident.tree.get_attribute(*key) - gone for key in layer.counts},
        made=frozenset(arrays),
    )


def _kept_rows(before: Rows | None, total: int, picked: list[int], tail: int) -> Rows | None:
    """Identity of a parameter after keeping the `picked` live rows, None if as in the checkpoint.

    before: its rows until now, None for the checkpoint's `total`.
    """
    ids: tuple[RowId, ...] = before.ids if before is not None else tuple(range(total))
    kept = [ids[row] for row in picked] + list(ids[len(ids) - tail :] if tail else ())
    return None if kept == list(range(total)) else Rows.of(kept)


def compact_delta(resident: Resident) -> Delta:
    """Slice the expert stacks to the live experts; the state of the weights does not change."""
    layers = []
    for moe in resident.layers:
        held = resident.stack[moe.layer.position]
        if held == moe.live:
            continue
        rows = tuple(held.index(expert) for expert in moe.live)
        modules = {}
        if moe.layer.experts_list:
            experts = resident.tree.get_list(moe.layer.experts)
            modules = {moe.layer.experts: [experts[row] for row in rows]}
        layers.append(
            LayerDelta(
                position=moe.layer.position,
                live=moe.live,
                resident=moe.live,
                arrays={p.path: FromResident(rows) for p in moe.layer.expert_parameters()},
                modules=modules,
            )
        )
    return Delta(tuple(layers), release=True)
