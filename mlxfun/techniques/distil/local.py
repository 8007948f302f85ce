"""Routers fitted layer by layer, without a gradient through the model.

For each MoE layer, with x the inputs that it gets in the edited model, f_e its experts now, and y(x)
what the routed experts of the checkpoint put out for the same inputs:

    W = argmin mean || sum_{e in top-k(Wx)} w_e(Wx) f_e(x) - y(x) ||^2 / mean || y(x) ||^2

by some passes of Adam from the router as it is. Gradients flow through the weights w_e of the
experts that are chosen. A fifth of the tokens is left out and decides, on W as it is stored, whether
the layer keeps its fit. How far the routers go, all together, towards their fits is decided by the KL on
held-out text. Layers behind a fitted one see it as it was fitted: one
pass over the model (mlxfun.hooks.layerwise), so it works on models that are read layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Batch
from mlxfun.editing.blocks import block_at_root
from mlxfun.errors import PlanError
from mlxfun.hooks.layerwise import OF_ROUTER, Carrier
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.experts import Bank
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.parameters import dequantised, rounded
from mlxfun.model.router_edit import RouterEdit
from mlxfun.model.router_formula import Routing, Seen
from mlxfun.techniques.distil.options import RATE, DistilOptions
from mlxfun.techniques.refit.follow import Follow
from mlxfun.techniques.refit.layerwise import Observed, observe
from mlxfun.techniques.refit.least_squares import energy, left_out, output
from mlxfun.techniques.workspace import Workspace

CLOSE = 0.02
"""How far the logits that the formula gives may be off those seen, relative to the largest."""

Matrix = dict[str, mx.array]
"""A router: "weight" float32 [R, D], and "bias" float32 [R] where it has one."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """routers: {position: as fitted}, of layers that are better for it. errors: {decoder layer: (before,
    after)}, see DistilReport."""

    routers: dict[int, Matrix]
    errors: dict[int, tuple[float, float]]

    def delta(self, workspace: Workspace, share: float) -> Delta:
        """The routers moved `share` of the way from what they are to what was fitted, as stored."""
        deltas = []
        for position, fitted in self.routers.items():
            moe = workspace.resident.layers[position]
            with workspace.resident.layer(moe.layer.index):
                now = _matrix(workspace, moe)
                moved = {
                    name: now[name] + share * (new - now[name]) for name, new in fitted.items()
                }
                deltas.append(stored_router(workspace, moe, moved))
        return Delta(tuple(deltas))


def fit_routers(
    workspace: Workspace, batches: Sequence[Batch], options: DistilOptions, ctx: Context = SILENT
) -> Fitted:
    """Fit every router. The committed state must be live, without steering; the model is as before.

    Raises PlanError for a router whose choice no known formula gives.
    """
    carrier = Carrier(workspace.model, workspace.taps, batches, ctx)
    routers: dict[int, Matrix] = {}
    errors: dict[int, tuple[float, float]] = {}
    layers = workspace.resident.layers
    with Follow(workspace, carrier) as follow:
        for number, moe in enumerate(layers):
            with carrier.at(moe.layer, ctx):
                layer = _Layer.of(workspace, carrier, moe, ctx)
                router, before, after = layer.fitted(options, ctx)
                errors[moe.layer.index] = (before, after)
                if router is not None:
                    routers[moe.layer.position] = router
                    follow.passed(moe, stored_router(workspace, moe, router), ctx)
                del layer
            ctx.progress("fitting routers", number + 1, len(layers), "layers")
    return Fitted(routers, errors)


@dataclass
class _Layer:
    """One layer with what it saw. router_inputs: float32 [T, D]. wanted: float32 [T, D]."""

    workspace: Workspace
    moe: LiveExperts
    bank: Bank
    routing: Routing
    router: Matrix
    router_inputs: mx.array
    inputs: mx.array
    wanted: mx.array

    @classmethod
    def of(cls, workspace: Workspace, carrier: Carrier, moe: LiveExperts, ctx: Context) -> _Layer:
        resident, layer = workspace.resident, moe.layer
        if layer.facts.weights_inside:
            raise PlanError(
                f"layer {layer.index}: the router of {layer.family} scales what experts are given, "
                "not what they put out, so its rows cannot be fitted to outputs; use distil without "
                "--local"
            )
        with block_at_root(workspace.editor, layer.position):
            before = observe(carrier, moe, ctx).routed
            wanted = output(Bank.of(moe, resident.tree.modules), before, ctx)
        seen = observe(carrier, moe, ctx)
        routed = seen.routed
        found = Seen(seen.logits, routed.chosen, routed.weights, seen.precision)
        made = cls(
            workspace,
            moe,
            Bank.of(moe, resident.tree.modules),
            Routing.of(moe, resident, found),
            _matrix(workspace, moe),
            _router_inputs(carrier, moe, ctx),
            routed.inputs,
            wanted,
        )
        made._require_linear(seen)
        return made

    def _require_linear(self, seen: Observed) -> None:
        """Raise PlanError where the logits seen are not those of the matrix."""
        z = self._logits(self.router, self.router_inputs)
        off = mx.max(mx.abs(z - seen.logits)) / mx.maximum(mx.max(mx.abs(seen.logits)), 1e-6)
        if not float(np.array(off)) <= CLOSE:
            raise PlanError(
                f"layer {self.moe.layer.index}: the router of {self.moe.layer.family} is no linear "
                "map of its inputs, so its rows cannot be fitted; use distil without --local"
            )

    def _logits(self, router: Matrix, x: mx.array) -> mx.array:
        """Of the live experts, float32 [n, E]."""
        z = x @ router["weight"].T
        if "bias" in router:
            z = z + router["bias"]
        return z[..., : len(self.moe.live)]

    def _error(self, router: Matrix, index: mx.array) -> mx.array:
        """Squared error of the output at some tokens, summed, lazy."""
        everyone = mx.ones((len(self.moe.live),), dtype=mx.bool_)
        chosen, weights = self.routing(self._logits(router, self.router_inputs[index]), everyone)
        made: Any = self.bank.experts(self.inputs[index], mx.stop_gradient(chosen))
        out = mx.sum(made.astype(mx.float32) * weights[..., None], axis=-2)
        return mx.sum(mx.square(out - self.wanted[index]))

    def fitted(self, options: DistilOptions, ctx: Context) -> tuple[Matrix | None, float, float]:
        """The fitted router, None where that is no better, and the errors on tokens left out: before,
        and of the router as it is stored."""
        out = left_out(int(self.inputs.shape[0]))
        inside, outside = (np.flatnonzero(part) for part in (~out, out))
        before = self._judged(self.router, outside, options)
        fitted = self._descend(options, inside, ctx)
        after = self._judged(self._stored(fitted), outside, options)
        return (fitted, before, after) if after < before else (None, before, before)

    def _descend(self, options: DistilOptions, tokens: Array, ctx: Context) -> Matrix:
        rng, size = np.random.default_rng(options.seed), options.step_of(len(tokens))
        starts = range(0, len(tokens), size)
        planned = options.passes * len(starts)
        rate = optimizers.cosine_decay(options.rate or RATE, max(planned, 1))
        adam: Any = optimizers.Adam(rate, bias_correction=True)
        router, scale = self.router, max(energy(self.wanted) / self.wanted.shape[0], 1e-30)

        def loss(router: Matrix, index: mx.array) -> mx.array:
            return self._error(router, index) / (index.size * scale)

        slope: Callable[[Matrix, mx.array], Matrix] = mx.grad(loss)
        for _ in range(options.passes):
            order = rng.permutation(tokens).astype(np.uint32)
            for start in starts:
                ctx.check()
                router = adam.apply_gradients(
                    slope(router, mx.array(order[start : start + size])), router
                )
                mx.eval(router, adam.state)
        return router

    def _judged(self, router: Matrix, tokens: Array, options: DistilOptions) -> float:
        """Squared error at `tokens` relative to the square of what is wanted there."""
        total = whole = 0.0
        size = options.step_of(len(tokens))
        for start in range(0, len(tokens), size):
            index = mx.array(tokens[start : start + size].astype(np.uint32))
            total += float(np.array(self._error(router, index)))
            whole += energy(self.wanted[index])
        return total / max(whole, 1e-30)

    def _stored(self, router: Matrix) -> Matrix:
        """A router as it is stored."""
        delta = stored_router(self.workspace, self.moe, router)
        with self.workspace.resident.trial(Delta((delta,))):
            return _matrix(self.workspace, self.moe)


def stored_router(workspace: Workspace, moe: LiveExperts, router: Matrix) -> LayerDelta:
    """A layer with a router, rounded to, or packed in, what it is stored in."""
    path = moe.layer.logits
    edit = RouterEdit(workspace.resident, workspace.stored)
    module = workspace.resident.tree.modules[path]
    arrays = edit.weights(module, path, router["weight"])
    if "bias" in router:
        name = f"{path}.bias"
        arrays[name] = rounded(router["bias"], workspace.stored(name), module["bias"].dtype)
    return edit.delta(moe, arrays)


def _matrix(workspace: Workspace, moe: LiveExperts) -> Matrix:
    module = workspace.resident.tree.modules[moe.layer.logits]
    found = {"weight": dequantised(module)}
    bias = module.get("bias")
    if isinstance(bias, mx.array):
        found["bias"] = bias.astype(mx.float32)
    mx.eval(found)
    return found


def _router_inputs(carrier: Carrier, moe: LiveExperts, ctx: Context) -> mx.array:
    """What the logits of every real token are of, float32 [T, D]."""
    parts = []
    for batch, records in carrier.observe(moe.layer.position, ctx, OF_ROUTER):
        seen = records[-1].router_inputs
        if seen is None:
            raise RuntimeError(f"the router of decoder layer {moe.layer.index} was not seen")
        real = mx.array(np.flatnonzero(batch.mask.reshape(-1)).astype(np.uint32))
        x = seen.reshape(-1, seen.shape[-1])[real].astype(mx.float32)
        mx.eval(x)
        parts.append(x)
    return mx.concatenate(parts)
