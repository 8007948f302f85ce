"""Candidate directions: differences of mean residual streams between two prompt sets, in one pass.

With h_l(x) the stream behind decoder layer l, at the last token of prompt x (where the answer
begins) or averaged over its tokens,

    v_l = mean over harmful x of h_l(x) - mean over harmless x of h_l(x),    d_l = v_l / |v_l|

Layers are ranked by |v_l|, before normalising. Sums are taken on the device in float32 within a
batch and added on the host in float64; the output head is never computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError, PlanError, UsageError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward
from mlxfun.hooks.pace import Pace
from mlxfun.hooks.replay import intercepting
from mlxfun.model.anatomy import MoEMap
from mlxfun.techniques.ablate.options import POSITIONS, Position, parse_range

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

AUTO_SHARE = 0.8
PASS = "residual means"
"""The share of layers, from the first, that "auto" looks at: the last ones write words."""


@dataclass(frozen=True, slots=True)
class Directions:
    """vectors: {position: float64 [L, D]}, not normalised; L counts decoder layers."""

    vectors: dict[str, Array]

    def norm(self, position: Position, layer: int) -> float:
        """|v| behind decoder layer `layer`."""
        return float(np.linalg.norm(self.vectors[position][layer]))

    def norms(self, position: Position) -> dict[int, float]:
        """{decoder layer: |v|}."""
        return {i: self.norm(position, i) for i in range(len(self.vectors[position]))}

    def unit(self, position: Position, layer: int) -> Array:
        """d, float64 [D]. Raises PlanError where the sets do not differ."""
        norm = self.norm(position, layer)
        if not np.isfinite(norm) or norm == 0:
            raise PlanError(
                f"harmful and harmless prompts do not differ behind decoder layer {layer} "
                f"(position {position}); choose other layers or other prompts"
            )
        unit: Array = self.vectors[position][layer] / norm
        return unit


def difference(harmful: Array, harmless: Array) -> Directions:
    """Directions from the means of two sets, float64 [P, L, D] each in the order of POSITIONS."""
    return Directions(dict(zip(POSITIONS, harmful - harmless, strict=True)))


def residual_means(
    model: nn.Module,
    anatomy: MoEMap,
    layers: Sequence[nn.Module],
    batches: Sequence[Batch],
    ctx: Context = SILENT,
    label: str = "reading prompts",
) -> Array:
    """Means of the stream behind each layer, float64 [P, L, D] in the order of POSITIONS.

    One forward of each batch, run layer by layer. Raises Cancelled between batches, ModelError
    for a model that does not run each of its layers once.
    """
    return means_of_sets(model, anatomy, layers, [batches], ctx, label)[0]


def means_of_sets(
    model: nn.Module,
    anatomy: MoEMap,
    layers: Sequence[nn.Module],
    sets: Sequence[Sequence[Batch]],
    ctx: Context = SILENT,
    label: str = "reading prompts",
) -> list[Array]:
    """`residual_means` of several sets, in one reading of a model on disk."""
    totals: list[Any] = [0.0 for _ in sets]
    counts = [sum(len(batch.rows) for batch in batches) for batches in sets]
    # Rows say which set a batch is of, also where it was halved.
    starts = np.cumsum([0, *counts]).tolist()
    todo = [
        replace(batch, rows=tuple(start + row for row in batch.rows))
        for start, batches in zip(starts, sets, strict=False)
        for batch in batches
    ]

    def watched(batch: Batch) -> Watch[Array]:
        return watch(model, layers, batch)

    done = 0
    paths = {id(module): path for path, module in model.named_modules()}
    task = Task(label, PASS, {"layers": [paths[id(layer)] for layer in layers]})
    for batch, sums in each_forward(model, anatomy, todo, watched, ctx, task):
        number = bisect_right(starts, batch.rows[0]) - 1
        totals[number] = totals[number] + sums
        done += len(batch.rows)
        ctx.progress(label, done, starts[-1], "prompts")
    return [total / count for total, count in zip(totals, counts, strict=True)]


def watch(model: nn.Module, layers: Sequence[nn.Module], batch: Batch) -> Watch[Array]:
    """Sums of one batch over its rows, float64 [P, L, D]."""
    lengths = batch.mask.sum(axis=1)
    last = np.zeros(batch.mask.shape, np.float32)
    last[np.arange(len(last)), lengths - 1] = 1.0
    mean = (batch.mask / lengths[:, None]).astype(np.float32)
    weights = mx.array(np.stack([last, mean]).reshape(len(POSITIONS), -1))
    sums: dict[int, list[mx.array]] = {}
    pace = Pace()

    def see(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = own(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.ndim == 4:  # several streams side by side: what they hold on average
            hidden = mx.mean(hidden, axis=2)
        made = weights @ hidden.reshape(-1, hidden.shape[-1]).astype(mx.float32)
        sums.setdefault(number, []).append(made)
        pace(made)
        return out

    def run() -> Array:
        model(mx.array(batch.tokens))
        times = sum(map(len, sums.values()))
        if times != len(layers) or len(sums) != len(layers):
            raise ModelError(
                f"the forward ran decoder layers {times} times, not each of the {len(layers)} "
                "once, so there is no one residual stream behind each of them to read"
            )
        stacked = mx.stack([sums[number][0] for number in range(len(layers))], axis=1)
        mx.eval(stacked)
        return np.array(stacked, dtype=np.float64)

    return Watch(run, lambda: intercepting(layers, see), sums)


def candidates(spec: str, layers: int) -> tuple[int, ...]:
    """The decoder layers whose directions come into question: "auto", "all", "a-b" or "a".

    >>> candidates("auto", 10), candidates("2-4", 10)
    ((0, 1, 2, 3, 4, 5, 6, 7), (2, 3, 4))

    Raises UsageError.
    """
    if spec == "all":
        return tuple(range(layers))
    if spec == "auto":
        return tuple(range(max(1, int(layers * AUTO_SHARE))))
    low, high = parse_range(spec, "--layers")
    if high >= layers:
        raise UsageError(f"--layers {spec}: the decoder layers of this model are 0..{layers - 1}")
    return tuple(range(low, high + 1))


def strongest(directions: Directions, position: Position, layers: Sequence[int]) -> int:
    """The layer with the largest |v| among `layers`."""
    return max(layers, key=lambda layer: directions.norm(position, layer))
