"""The calibration loop: batches through the tapped model into routing statistics, with live frames.

One forward per batch, run layer by layer (mlxfun.hooks.pace): each layer's sums [S, E] are scheduled
where they arise, so that the layer's expert outputs can be freed, and are added on the host in float64 when the batch's forward
is complete. The logits are never evaluated, so the output head costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.errors import Cancelled
from mlxfun.events import RoutingFrame
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward, reduced
from mlxfun.hooks.routing import Record, Taps
from mlxfun.model.anatomy import MoELayer

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

FRAMES_PER_SECOND = 12
PASS = "routing sums"


def layer_sums(
    layer: MoELayer, records: Sequence[Record], mask: mx.array, measured: bool = True
) -> mx.array:
    """Sums over tokens, float32 [S, E] in the order of stats.SUMS, lazy.

    mask: [N] 1.0 for tokens that count. measured: whether the records have norms; without them the
    sums that are made of norms are 0. A product with a one-hot matrix adds in a fixed order on
    every device (scatter-add does not on a GPU); a batch's sums fit float32, and batches are
    added in float64 by the caller.
    """
    experts = layer.num_experts
    total = mx.zeros((len(SUMS) if measured else 2, experts))
    for record in records:
        k = record.indices.shape[-1]
        index = record.indices.reshape(-1, k)
        weights = applied_weights(record).reshape(-1, k).astype(mx.float32)
        valid = mx.broadcast_to(mask[:, None], index.shape)
        if layer.router_rows > experts:
            # longcat's zero experts appear as index 0 with weight 0: nothing was routed there.
            valid = valid * (weights != 0)
        found = [mx.ones_like(weights), weights]
        if measured:
            norms = _norms(record).reshape(-1, k)
            contribution = norms if layer.facts.weights_inside else weights * norms
            found += [norms, contribution, mx.square(contribution), mx.square(norms)]
        values = mx.where(valid > 0, mx.stack(found), 0.0).reshape(len(found), -1)
        one_hot = (index.reshape(-1, 1) == mx.arange(experts)).astype(mx.float32)
        total = total + values @ one_hot
    missing = len(SUMS) - total.shape[0]
    return mx.pad(total, [(0, missing), (0, 0)]) if missing else total


def applied_weights(record: Record) -> mx.array:
    """The weights [..., K] of a record. Raises RuntimeError if the forward showed none."""
    if record.weights is None:
        raise RuntimeError("the forward did not show its routing weights; see mlxfun.hooks.routing")
    return record.weights


def _norms(record: Record) -> mx.array:
    if record.norms is None:
        raise RuntimeError("norms were not recorded")
    return record.norms


def token_sums(
    layers: Sequence[MoELayer], experts: Array, weights: Array, norms: Array | None
) -> Array:
    """Sums of N tokens, float64 [L, S, E] in the order of stats.SUMS, from arrays on the host.

    experts: int [N, L, K], -1 where unused; weights and norms: float32 [N, L, K]. The products are
    made in float32, as `layer_sums` makes them. norms: None where they were not measured, which
    leaves the sums that are made of them at 0.
    """
    most = max(layer.num_experts for layer in layers)
    total = np.zeros((len(layers), len(SUMS), most))
    where = np.nonzero(experts >= 0)
    places = where[1] * most + experts[where]
    weight = weights[where]
    values = [np.ones_like(weight), weight]
    if norms is not None:
        norm = norms[where]
        inside = np.array([layer.facts.weights_inside for layer in layers])[where[1]]
        contribution = np.where(inside, norm, weight * norm)
        values += [norm, contribution, np.square(contribution), np.square(norm)]
    for index, value in enumerate(values):
        sums = np.bincount(places, value, len(layers) * most)
        total[:, index] = sums.reshape(len(layers), most)
    return total


def collect(
    model: nn.Module,
    taps: Taps,
    batches: Sequence[Batch],
    start: RoutingStats,
    ctx: Context = SILENT,
    on_progress: Callable[[RoutingStats], None] | None = None,
) -> tuple[RoutingStats, bool]:
    """Run every batch and add its routing to `start`.

    Returns the statistics and whether the run was cancelled; a cancel between batches keeps what
    was collected. `on_progress` is called with the statistics after each batch.
    """
    stats, last_frame = start, 0.0
    total = sum(len(batch.rows) for batch in batches)
    done = 0
    rising = _Rising(start, ctx)

    def watched(batch: Batch) -> Watch[Array]:
        one = watch(model, taps, batch)
        rising.seen.append(one.seen)
        return replace(one, passed=rising.show) if len(rising.seen) == 1 else one

    task = Task("calibrating", PASS)
    running = each_forward(model, taps.anatomy, batches, watched, ctx, task)
    while True:
        try:
            batch, sums = next(running)
        except StopIteration:
            return stats, False
        except Cancelled:
            return stats, True
        stats = stats.plus(sums, len(batch.rows), int(batch.mask.sum()))
        done += len(batch.rows)
        if on_progress is not None:
            on_progress(stats)
        ctx.progress("calibrating", done, total, "samples")
        if monotonic() - last_frame > 1 / FRAMES_PER_SECOND or done == total:
            ctx.emit(frame(stats, job=0))
            last_frame = monotonic()


class _Rising:
    """The live picture of a pass in which all batches pass one layer after the other: the layers
    that were passed are whole, the others as before.

    seen: of each batch, its sums [S, E] by position of the layer.
    """

    def __init__(self, start: RoutingStats, ctx: Context) -> None:
        self._stats, self._ctx = start, ctx
        self.seen: list[Mapping[int, Sequence[mx.array]]] = []
        self._shown: set[int] = set()

    def show(self) -> None:
        """Add the layers that are new, and emit a frame if there are any."""
        layers, experts = self._stats.sums["freq"].shape
        update, new = np.zeros((layers, len(SUMS), experts)), self.seen[0].keys() - self._shown
        for position in new:
            for one in self.seen:
                sums = np.array(one[position][0])
                update[position, :, : sums.shape[1]] += sums
        if new:
            self._shown |= new
            self._stats = self._stats.plus(update, 0, 0)
            self._ctx.emit(frame(self._stats, job=0))


def watch(model: nn.Module, taps: Taps, batch: Batch) -> Watch[Array]:
    """Sums of one batch, [L, S, E]."""
    mask = mx.array(batch.mask.reshape(-1).astype(np.float32))
    reduction = taps.reduction(lambda tap, record: layer_sums(tap.layer, [record], mask))
    return reduced(model, taps, batch, reduction)


def frame(stats: RoutingStats, job: int) -> RoutingFrame:
    """The live picture of `stats`."""
    return RoutingFrame(
        job=job,
        freq=stats.sums["freq"].astype(np.int64),
        reap_sum=stats.sums["reap_sum"],
        samples=stats.samples,
        tokens=stats.tokens,
    )
