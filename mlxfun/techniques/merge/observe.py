"""Calibration statistics of one layer for merging: sums over all tokens, and a sample of tokens
with expert inputs and router logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.calibration.collect import layer_sums
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.anatomy import MoELayer

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.hooks.routing import Record
from mlxfun.model.live_experts import LiveExperts


@dataclass(frozen=True, slots=True)
class Observed:
    """What one layer saw. inputs: [T, D] of a spread of tokens, as the experts got them (for
    experts that get their input weighted: without the weight); logits: float32 [T, E], of the live
    experts; gates: float32 [T, E], as probabilities; stats: [1, E] over all tokens.
    """

    inputs: mx.array
    logits: Array
    gates: mx.array
    stats: RoutingStats


def observe(
    carrier: Carrier, moe: LiveExperts, picks: Sequence[Array], ctx: Context = SILENT
) -> Observed:
    """Run a layer on all batches; keep its sums over all tokens, and `picks` of the tokens."""
    layer = moe.layer
    stats = RoutingStats.empty((layer.index,), layer.num_experts)
    inputs, logits = [], []
    for (batch, records), pick in zip(carrier.observe(layer.position, ctx), picks, strict=True):
        mask = mx.array(batch.mask.reshape(-1).astype(np.float32))
        sums = layer_sums(layer, records, mask)
        x, z = _tokens(layer, records[-1], mx.array(pick.astype(np.uint32)))
        mx.eval(sums, x, z)
        stats = stats.plus(
            np.array(sums).reshape(1, len(SUMS), -1), len(batch.rows), int(batch.mask.sum())
        )
        inputs.append(x)
        logits.append(z)
    z = mx.concatenate(logits)
    sigmoid = layer.facts.score == "sigmoid"
    gates = mx.sigmoid(z) if sigmoid else mx.softmax(z, axis=-1)
    live = len(moe.live)  # rows behind them are no experts (longcat)
    return Observed(mx.concatenate(inputs), np.array(z[:, :live]), gates[:, :live], stats)


def _tokens(layer: MoELayer, record: Record, pick: mx.array) -> tuple[mx.array, mx.array]:
    """Expert inputs [n, D] and float32 logits [n, R] of the picked tokens."""
    if record.inputs is None or record.logits is None or record.weights is None:
        raise RuntimeError(f"the forward did not show what decoder layer {layer.index} routes")
    x = record.inputs.reshape(-1, record.inputs.shape[-1])[pick]
    logits = record.logits.reshape(-1, record.logits.shape[-1])[pick].astype(mx.float32)
    if layer.facts.weights_inside:
        weight = record.weights.reshape(-1, 1)[pick].astype(mx.float32)
        x = (x.astype(mx.float32) / mx.maximum(weight, 1e-6)).astype(x.dtype)
    return x, logits
