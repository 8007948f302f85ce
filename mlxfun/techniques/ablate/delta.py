"""Weights with a direction projected out of every matrix that writes to the residual stream.

A. Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024). With d a
direction of length 1, W [D, H] a projection that writes to the stream and s a strength,

    W' = W - s d (d^T W),    b' = b - s d (d^T b)

on the *output* side: what the projection adds loses the share s of its component along d. s = 1
removes it, s > 1 turns its sign, which also undoes what earlier parts or the embedding wrote.

Where the output passes a norm with gain g before it is added, the direction there is g * d, of
length 1 again (mlxfun.model.outputs.gain). Experts in a latent space that share the projection
U back to the stream are edited in U; single ones of them in their own output along U^T d.

An oblique projection (mlxfun.techniques.ablate.oblique) reads along U and writes along V, [K, D]
each: W' = W - s V^T (U W). An orthogonal one has V = U = d.

The same projection on *activations*, y' = y - s V^T (U y), is what a trial of a search runs:
exact for unquantised weights, and no weight is touched (`Projector`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.errors import PlanError
from mlxfun.hooks.intercept import Hooks
from mlxfun.model.delta import Delta, Keep, LayerDelta, Resident
from mlxfun.model.identity import RowId, Rows
from mlxfun.model.outputs import Output, gain
from mlxfun.model.parameters import (
    PACKED,
    Stored,
    dequantised,
    requantised,
    rounded,
    row_digests,
    whole_digest,
)
from mlxfun.techniques.ablate.plan import AblationPlan

ROWS_AT_ONCE = 64 << 20
"""Bytes of a stack that are unpacked to float32 at a time."""


@dataclass(frozen=True, slots=True)
class Projection:
    """What one output loses. write, read: float32 [K, D'], see the module's text; an orthogonal
    projection has one row in either, of length 1. strength: of the whole output.

    experts: the experts of a stack that lose it, in checkpoint numbers; None for all.
    """

    output: Output
    write: mx.array
    read: mx.array
    strength: float
    experts: tuple[int, ...] | None = None


def projections(
    outputs: Sequence[Output], plan: AblationPlan, resident: Resident
) -> list[Projection]:
    """What each output loses by `plan`; outputs that lose nothing are left out."""
    wanted = mx.array(np.array(plan.direction, np.float32))
    found = []
    for output in outputs:
        strength = plan.strengths.get(output.component, {}).get(output.layer, 0.0)
        chosen = _chosen(output, plan, resident)
        if not strength or not _edited(output, plan) or chosen == ():
            continue
        if plan.erasers:
            pair = _oblique(output, plan)
            if pair is None:
                continue
            found.append(Projection(output, *pair, strength, chosen))
        else:
            direction = _in_memory_direction(resident, output, wanted)[None]
            found.append(Projection(output, direction, direction, strength, chosen))
    mx.eval([(p.write, p.read) for p in found])
    return found


def _oblique(output: Output, plan: AblationPlan) -> tuple[mx.array, mx.array] | None:
    """What an output loses by an oblique projection, None for nothing. Raises PlanError."""
    if output.through is not None:
        raise PlanError(
            f"single experts of {output.path} put out in a latent space, where an oblique "
            "projection is not defined; use --projection orthogonal"
        )
    eraser = plan.erasers.get(output.path)
    return None if eraser is None else (mx.array(eraser.write), mx.array(eraser.read))


def _in_memory_direction(resident: Resident, output: Output, wanted: mx.array) -> mx.array:
    """`local_direction`, evaluated while what it needs is in memory."""
    with ExitStack() as stack:
        for path in _needed(output):
            stack.enter_context(resident.module(path))
        direction = local_direction(resident.tree.modules, output, wanted)
        mx.eval(direction)
    return direction


def _needed(output: Output) -> list[str]:
    """The modules whose parameters `local_direction` reads."""
    back = [] if output.through is None else [output.through.path, *_needed(output.through)]
    return list(dict.fromkeys([*output.norms, *back]))


def _edited(output: Output, plan: AblationPlan) -> bool:
    """Of latent experts the way back is edited for all of them, their own stack for some."""
    if output.component != "experts":
        return True
    if output.rows == "":
        return plan.experts is None
    return output.through is None or plan.experts is not None


def _chosen(output: Output, plan: AblationPlan, resident: Resident) -> tuple[int, ...] | None:
    """The live experts of a stack that are edited, None for outputs that are no stack.

    () for an expert of a list that is not edited.
    """
    if output.rows == "" or output.position is None:
        return None
    live = resident.layers[output.position].live
    named = live if plan.experts is None else plan.experts.get(output.layer, ())
    if output.rows == "one":
        return (output.expert,) if output.expert in live and output.expert in named else ()
    return tuple(e for e in live if e in set(named))


def local_direction(
    modules: Mapping[str, nn.Module], output: Output, direction: mx.array
) -> mx.array:
    """The stream's `direction` [D] as it is where `output` puts out, float32, length 1."""
    if output.through is not None:
        back = local_direction(modules, output.through, direction)
        direction = back @ dequantised(modules[output.through.path])
    local = direction * gain(modules, output, direction.shape[0])
    return local / mx.linalg.norm(local)


# -- weights ----------------------------------------------------------------------------------


def _in_memory(layer: LayerDelta) -> LayerDelta:
    return layer


def ablate_delta(
    wanted: Sequence[Projection],
    resident: Resident,
    stored: Stored,
    ctx: Context = SILENT,
    hold: Keep = _in_memory,
) -> Delta:
    """New weights for every projection; the model is as it was.

    stored: the dtype that a parameter is saved in. Every new tensor is rounded to it, or packed in
    the quantisation it had, right here. hold: what is kept of a layer that is done. Raises
    Cancelled between projections.
    """
    by_layer: dict[int, list[Projection]] = {}
    for projection in wanted:
        by_layer.setdefault(projection.output.layer, []).append(projection)
    layers = []
    for number, index in enumerate(sorted(by_layer)):
        arrays: dict[str, mx.array] = {}
        rows: dict[str, Rows | None] = {}
        for projection in by_layer[index]:
            ctx.check()
            edit = _Edit(projection, resident, stored)
            with resident.module(projection.output.path):
                for path, (array, identity) in edit.run().items():
                    arrays[path], rows[path] = array, identity
        if arrays:
            position = by_layer[index][0].output.position
            layers.append(hold(_layer_delta(position, resident, arrays, rows)))
        ctx.progress("removing the direction", number + 1, len(by_layer), "layers")
    return Delta(tuple(layers))


def _layer_delta(
    position: int | None,
    resident: Resident,
    arrays: dict[str, mx.array],
    rows: dict[str, Rows | None],
) -> LayerDelta:
    made = frozenset(arrays)
    if position is None:
        return LayerDelta(None, arrays=arrays, rows=rows, made=made)
    return LayerDelta(
        position,
        resident.layers[position].live,
        resident.stack[position],
        arrays=arrays,
        rows=rows,
        made=made,
    )


class _Edit:
    """One projection on the weights of one module."""

    def __init__(self, projection: Projection, resident: Resident, stored: Stored) -> None:
        self._projection = projection
        self._resident = resident
        self._stored = stored
        self._path = projection.output.path
        self._module = resident.tree.modules[self._path]

    def run(self) -> dict[str, tuple[mx.array, Rows | None]]:
        """{path: (new array, identity of its rows)} of what changes."""
        whole = self._projection.output.rows != "stack"
        edited = self._whole() if whole else self._stack()
        mx.eval([array for array, _ in edited.values()])
        return edited

    def _dtype(self, leaf: str) -> mx.Dtype:
        return self._stored(f"{self._path}.{leaf}")

    def _project(self, weight: mx.array) -> mx.array:
        """weight [..., D, H] or bias [..., D, 1] without its share along the direction."""
        lost = self._projection
        along = [lost.read[k] @ weight for k in range(len(lost.read))]
        for k, part in enumerate(along):
            weight = weight - lost.strength * lost.write[k][:, None] * part[..., None, :]
        return weight

    def _new(self, rows: Sequence[int] | None) -> dict[str, mx.array]:
        """The edited leaves of the module, of some rows of a stack or whole."""
        weight = self._project(dequantised(self._module, rows))
        new = requantised(self._module, weight, self._dtype)
        bias = self._module.get("bias")
        if bias is not None:
            part = bias if rows is None else bias[mx.array(list(rows))]
            moved = self._project(part.astype(mx.float32)[..., None])[..., 0]
            new["bias"] = rounded(moved, self._dtype("bias"), bias.dtype)
        return new

    def _whole(self) -> dict[str, tuple[mx.array, Rows | None]]:
        found: dict[str, tuple[mx.array, Rows | None]] = {}
        for leaf, array in self._new(None).items():
            if not mx.array_equal(array, self._module[leaf]).item():
                path = f"{self._path}.{leaf}"
                found[path] = (array, Rows.of([whole_digest(array, self._stored(path))]))
        return found

    def _stack(self) -> dict[str, tuple[mx.array, Rows | None]]:
        """Rows of a stack a few at a time: unpacked they are many times as large."""
        output = self._projection.output
        assert output.position is not None
        moe = self._resident.layers[output.position]
        row_of = dict(zip(moe.live, moe.rows, strict=True))
        rows = [row_of[e] for e in self._projection.experts or ()]
        stacks = {
            leaf: mx.array(self._module[leaf])
            for leaf in (*PACKED, "bias")
            if isinstance(self._module.get(leaf), mx.array)
        }
        one = dequantised(self._module, rows[:1]).nbytes
        digests: dict[str, dict[int, str]] = {leaf: {} for leaf in stacks}
        step = max(1, ROWS_AT_ONCE // one)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            for leaf, new in self._new(part).items():
                digests[leaf] |= self._changed(leaf, part, new)
                stacks[leaf][mx.array(part)] = new
            mx.eval(list(stacks.values()))
        return {
            f"{self._path}.{leaf}": (array, self._identity(leaf, moe.rows, digests[leaf]))
            for leaf, array in stacks.items()
            if digests[leaf]
        }

    def _changed(self, leaf: str, rows: list[int], new: mx.array) -> dict[int, str]:
        """{row of the stack: hash} of the rows that are not as they were."""
        base = self._module[leaf][mx.array(rows)]
        same = np.array(mx.all((new == base).reshape(len(rows), -1), axis=1))
        places = np.flatnonzero(~same)
        if not len(places):
            return {}
        hashes = row_digests(new[mx.array(places)], self._dtype(leaf))
        return {rows[place]: h for place, h in zip(places, hashes, strict=True)}

    def _identity(self, leaf: str, live_rows: Sequence[int], digests: dict[int, str]) -> Rows:
        """Identities of the live rows: as before, and of the new ones their hash."""
        before = self._resident.ledger.get(f"{self._path}.{leaf}")
        ids: tuple[RowId, ...] = before.ids if before is not None else tuple(range(len(live_rows)))
        return Rows.of([digests.get(row, own) for row, own in zip(live_rows, ids, strict=True)])


# -- activations ------------------------------------------------------------------------------


class Projector:
    """Projects what outputs put out, while attached, by `table`: trials without new weights."""

    def __init__(self, resident: Resident, outputs: Sequence[Output]) -> None:
        self._resident = resident
        self._outputs = {output.path: output for output in outputs}
        self._table: dict[str, tuple[mx.array, mx.array, mx.array]] = {}

    def set(self, wanted: Sequence[Projection]) -> None:
        """Replace what is projected from the next forward on."""
        self._table = {}
        for projection in wanted:
            strength = mx.array(projection.strength, dtype=mx.float32)
            if projection.output.rows == "stack":
                strength = strength * self._mask(projection)
            self._table[projection.output.path] = (projection.write, projection.read, strength)
        mx.eval(list(self._table.values()))

    def _mask(self, projection: Projection) -> mx.array:
        """1.0 for the rows of the stack that are projected, float32 [R]."""
        assert projection.output.position is not None
        stack = self._resident.stack[projection.output.position]
        chosen = set(projection.experts or ())
        return mx.array([1.0 if e in chosen else 0.0 for e in stack])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Intercept every output inside the block."""
        hooks = Hooks(self._resident.tree.modules)
        for path, output in self._outputs.items():
            hooks.on_call(path, self._projected(path, output.rows == "stack"), required=False)
        with hooks:
            try:
                yield
            finally:
                self._table = {}

    def _projected(self, path: str, stack: bool) -> Callable[..., mx.array]:
        def call(own: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            y: mx.array = own(x, *args, **kwargs)
            entry = self._table.get(path)
            if entry is None:
                return y
            write, read, strength = entry
            wide = y.astype(mx.float32)
            along = [wide @ read[k] for k in range(len(read))]
            if stack:  # y is [..., 1, D'], one row for each of the indices [...]
                indices = args[0] if args else kwargs["indices"]
                strength = strength[indices][..., None]
            for k, part in enumerate(along):
                wide = wide - (strength * part)[..., None] * write[k]
            return wide.astype(y.dtype)

        return call
