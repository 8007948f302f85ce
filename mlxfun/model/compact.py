"""The delta that slices pruned experts out of memory."""

from __future__ import annotations

from mlxfun.model.delta import Delta, FromResident, LayerDelta, Resident


def compact_delta(resident: Resident) -> Delta:
    """Slice the expert stacks to the live experts; the state of the weights does not change."""
    layers = []
    for tap in resident.taps.layers:
        held = resident.stack[tap.layer.position]
        if held == tap.live:
            continue
        rows = tuple(held.index(expert) for expert in tap.live)
        modules = {}
        if tap.layer.experts_list:
            experts = resident.tree.get_list(tap.layer.experts)
            modules = {tap.layer.experts: [experts[row] for row in rows]}
        layers.append(
            LayerDelta(
                position=tap.layer.position,
                live=tap.live,
                resident=tap.live,
                arrays={p.path: FromResident(rows) for p in tap.layer.expert_parameters()},
                modules=modules,
            )
        )
    return Delta(tuple(layers), release=True)
