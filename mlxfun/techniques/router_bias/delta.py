"""Router deltas that boost experts: exactly in a bias, or by least squares in the router's rows.

An addend for an expert goes where the layer can hold it, in this order:

    selection bias   routers that have one: exact, and the weights stay the model's own
    router bias      routers whose logits have a bias: exact, on the logits
    router rows      all others. Stock loading rejects a bias that is not in the checkpoint, so the
                     addend is folded into the expert's row: with v such that v.x is close to 1 for
                     the inputs x of the layer's router, row_e + b v makes the logit z_e + b (v.x)

v is the least-squares solution over calibration inputs X [T, D], v = (X^T X + mu I)^-1 X^T 1. Norms
leave their outputs with a strong common direction, which makes the fit good; how good is measured
on a fifth of the tokens that are left out of it (R^2 = 1 - mean (1 - v.x)^2).

New rows are rounded to, or packed in, what they are stored in, right here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.hooks.layerwise import OF_ROUTER, Carrier
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import LayerDelta
from mlxfun.model.parameters import dequantised
from mlxfun.model.router_edit import RouterEdit
from mlxfun.techniques.refit.least_squares import left_out
from mlxfun.techniques.router_bias.reports import BoostWay

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.model.live_experts import LiveExperts

SELECTION: BoostWay = "selection bias"
LOGITS: BoostWay = "router bias"
ROWS: BoostWay = "router rows"

RIDGE = 1e-3
"""mu as a share of the mean square of an input's feature: inputs lie in fewer than D dimensions."""

LEAST_FACTOR = 0.25
"""Of v.x, where a fold must reach every token: below this the fold does not hold anyway."""


@dataclass(frozen=True, slots=True)
class Fold:
    """v of one layer. direction: float32 [D]. r2, mean, deviation: of v.x on tokens left out.

    lowest: v.x of the lowest hundredth of them. reach: the widest span of logits of any token.
    """

    direction: Array
    r2: float
    mean: float
    deviation: float
    lowest: float
    reach: float


def way_of(layer: MoELayer, modules: dict[str, nn.Module]) -> BoostWay:
    """Where a layer holds an addend."""
    if layer.bias_name is not None:
        return SELECTION
    bias = modules[layer.logits].get("bias")
    return LOGITS if isinstance(bias, mx.array) and bias.ndim == 1 else ROWS


def folds(carrier: Carrier, taps: Sequence[LiveExperts], ctx: Context = SILENT) -> dict[int, Fold]:
    """{position: Fold} of the layers of `taps`, in one pass over the model."""
    found = {}
    for done, moe in enumerate(taps):
        with carrier.at(moe.layer, ctx):
            found[moe.layer.position] = _fold(carrier, moe, ctx)
        ctx.progress("fitting routers", done + 1, len(taps), "layers")
    return found


def _fold(carrier: Carrier, moe: LiveExperts, ctx: Context) -> Fold:
    inputs, logits = [], []
    for batch, records in carrier.observe(moe.layer.position, ctx, OF_ROUTER):
        seen, z = records[-1].router_inputs, records[-1].logits
        if seen is None or z is None:
            raise RuntimeError(f"the router of decoder layer {moe.layer.index} was not seen")
        real = mx.array(np.flatnonzero(batch.mask.reshape(-1)).astype(np.uint32))
        x = seen.reshape(-1, seen.shape[-1])[real].astype(mx.float32)
        span = z.reshape(-1, z.shape[-1])[real].astype(mx.float32)
        span = mx.max(span, axis=-1) - mx.min(span, axis=-1)
        mx.eval(x, span)
        inputs.append(np.array(x))
        logits.append(np.array(span))
    return fit(np.concatenate(inputs), float(np.concatenate(logits).max()))


def fit(x: Array, reach: float = 0.0) -> Fold:
    """The fold for inputs x [T, D]; see the module's text."""
    out = left_out(len(x))
    inside, outside = _products(x[~out]), _products(x[out])
    factor = x[out] @ _direction(*inside)
    return Fold(
        direction=_direction(inside[0] + outside[0], inside[1] + outside[1]),
        r2=float(1 - np.mean((1 - factor) ** 2)),
        mean=float(factor.mean()),
        deviation=float(factor.std()),
        lowest=float(np.quantile(factor, 0.01)),
        reach=reach,
    )


def _products(x: Array) -> tuple[Array, Array]:
    """X^T X, made on the device, and X^T 1, both float64."""
    held = mx.array(x)
    return np.array(held.T @ held).astype(np.float64), x.sum(axis=0, dtype=np.float64)


def _direction(normal: Array, sums: Array) -> Array:
    mu = RIDGE * np.trace(normal) / len(normal)
    v: Array = np.linalg.solve(normal + mu * np.eye(len(normal)), sums)
    return v.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Edit(RouterEdit):
    """Addends where a layer can hold them."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its path."""
        return self.resident.tree.modules

    def raised(self, moe: LiveExperts, addends: Array, fold: Fold | None) -> LayerDelta:
        """Add addends [live experts] where the layer holds them; a fold where that is its rows."""
        layer, way = moe.layer, way_of(moe.layer, self.modules)
        if way == ROWS:
            assert fold is not None
            with self.resident.module(layer.logits):
                return self._rows(moe, addends, fold)
        path = (
            f"{layer.bias_owner}.{layer.bias_name}" if way == SELECTION else f"{layer.logits}.bias"
        )
        held = self.resident.tree.get(path)
        whole = np.zeros(held.shape, np.float32)
        whole[: len(addends)] = addends
        return self.replaced(moe, path, held.astype(mx.float32) + mx.array(whole))

    def _rows(self, moe: LiveExperts, addends: Array, fold: Fold) -> LayerDelta:
        path = moe.layer.logits
        module: Any = self.modules[path]
        # As the module holds it: a moe may stand for a gate's weight.
        weight = dequantised(module)
        whole = np.zeros(weight.shape[0], np.float32)
        whole[: len(addends)] = addends
        change = mx.array(whole)[:, None] * mx.array(fold.direction)[None]
        moved = mx.array(np.flatnonzero(whole).astype(np.uint32))
        arrays = self.weights(module, path, weight + change)
        if f"{path}.global_scale" not in arrays:
            arrays = {
                name: _with_rows(module[name.rpartition(".")[2]], array, moved)
                for name, array in arrays.items()
            }
        return self.delta(moe, arrays)


def _with_rows(held: mx.array, new: mx.array, rows: mx.array) -> mx.array:
    """`held` with `rows` of `new`: the others stay as they are, to the last bit."""
    whole = mx.array(held)
    whole[rows] = new[rows]
    return whole
