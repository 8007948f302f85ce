"""Runs of patching: the pair of prompts, what both give, and batches of patched runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.errors import UsageError
from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.tracing.interventions import Edit
from mlxfun.tracing.names import Point
from mlxfun.tracing.options import ComponentName
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.patching.metrics import Measured
from mlxfun.tracing.patching.units import (
    ACROSS,
    ExpertPatch,
    Patch,
    SavedRoutes,
    Unit,
    experts_point,
    points_of,
)
from mlxfun.tracing.prompts import Batch, Prompt, encode, padded
from mlxfun.tracing.run import Run
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.values import Saved

SMALLEST_GAP = 1e-4
"""Clean and corrupted runs whose metric differs by less are not told apart by it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts of equally many tokens, whose positions correspond."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]


def pairs_of(
    parts: Parts, clean: Prompt | Sequence[Prompt], corrupted: Prompt | Sequence[Prompt]
) -> list[Pair]:
    """The pairs. Raises UsageError where tokens cannot correspond: the lengths are not the same."""
    rows = [encode(parts.tokenizer, some, parts.map.vocabulary) for some in (clean, corrupted)]
    if len(rows[0]) != len(rows[1]):
        raise UsageError(
            f"{len(rows[0])} clean and {len(rows[1])} corrupted prompts make no pairs; give as many"
        )
    for one, other in zip(*rows, strict=True):
        if len(one) != len(other):
            raise UsageError(
                f"the clean prompt has {len(one)} tokens and the corrupted one {len(other)}: a "
                "position would not mean the same in both; choose texts that are as many tokens "
                f"({_words(parts, one)} | {_words(parts, other)})"
            )
        if one == other:
            raise UsageError("the clean and the corrupted prompt are the same tokens")
    return [Pair(tuple(a), tuple(b)) for a, b in zip(*rows, strict=True)]


def _words(parts: Parts, ids: Sequence[int]) -> str:
    return " ".join(repr(parts.tokenizer.decode([i])) for i in ids)


def last_logits(parts: Parts, tokens: Sequence[int]) -> mx.array:
    """float32 [V], the logits of the last token."""
    saved = Saved(parts.names.point("output"), -1)
    run_once(parts, padded([tokens]), [], [saved])
    return saved.value[0].astype(mx.float32)


def clean_values(
    parts: Parts, tokens: Sequence[int], component: ComponentName, layers: Sequence[int]
) -> dict[str, Saved]:
    """{point: its value in one run}, evaluated."""
    points = [point for layer in layers for point in points_of(parts, component, layer)]
    saved = {p.name: SavedRoutes(p) if p.kind == "expert" else Saved(p) for p in points}
    run_once(parts, padded([tokens]), [], list(saved.values()))
    return saved


def patches(
    parts: Parts,
    component: ComponentName,
    units: Sequence[Unit],
    clean: dict[str, Saved],
) -> list[tuple[Point, Patch | ExpertPatch]]:
    """The edits of a batch whose row i has unit i of the clean run."""
    made: list[tuple[Point, Patch | ExpertPatch]] = []
    for layer in sorted({unit.layer for unit in units}):
        rows = [row for row, unit in enumerate(units) if unit.layer == layer]
        if component == "expert":
            point = experts_point(parts, layer)
            kept = clean[point.name]
            assert isinstance(kept, SavedRoutes)
            experts = mx.array([units[row].column for row in rows])
            made.append((point, ExpertPatch(tuple(rows), experts, kept.by_expert(experts))))
            continue
        heads = ACROSS[component] == "head"
        for point in points_of(parts, component, layer):
            value = clean[point.name].value
            axis = 1 if heads else position_axis(parts, point)
            where = np.zeros((len(units), value.shape[axis]), np.bool_)
            where[rows, [units[row].column for row in rows]] = True
            made.append((point, Patch(where, value, heads)))
    return made


def position_axis(parts: Parts, point: Point) -> int:
    """Which axis of a value counts positions: the second, but for gemma3n's streams."""
    path = point.path
    if point.layer is None or path != parts.layer(point.layer).path:
        return 1
    return 2 if facts.STREAMS.get(module_name(parts.modules[path])) == 0 else 1


def patched_metric(
    parts: Parts,
    tokens: Sequence[int],
    edits: Sequence[tuple[Point, Edit]],
    rows: int,
    measured: Measured,
) -> mx.array:
    """The metric of each row of a batch of the same prompt, float32 [rows], lazy."""
    batch = padded([tokens] * rows)
    return measured.metric(final_logits(parts, batch, edits))


def final_logits(parts: Parts, batch: Batch, edits: Sequence[tuple[Point, Edit]]) -> mx.array:
    """float32 [B, V], logits of the last token of a forward with edits, lazy."""
    with Run(parts, edits, [], batch) as run:
        logits = parts.forward(mx.array(batch.tokens))[:, -1]
    run.require_reached()
    out: mx.array = logits.astype(mx.float32)
    return out


def gap(measured: Measured, clean: mx.array, corrupted: mx.array) -> tuple[float, float]:
    """The metric of the clean and of the corrupted run. Raises UsageError where they are alike."""
    both = [float(np.array(measured.metric(one[None]))[0]) for one in (clean, corrupted)]
    if abs(both[0] - both[1]) < SMALLEST_GAP:
        raise UsageError(
            f"{measured.name} is {both[0]:.4g} in the clean and {both[1]:.4g} in the corrupted run: "
            "there is nothing to restore; choose other prompts, another metric or other answers"
        )
    return both[0], both[1]
