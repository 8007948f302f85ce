"""A probe of one MoE layer: looks at its route and at what its experts add, and may change both.

It sits outside the routing taps (mlxfun.hooks.routing), which steer and map the experts of a
virtual prune: what it sees is what the router then uses.

    logits        what the router chooses by, steering included
    choice        the experts of each token, in checkpoint numbers
    weights       what each chosen expert's output is multiplied by
    contribution  that product, which the block sums over the chosen experts
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlxfun.errors import HookError
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.routers import GateWeight
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.live_experts import LiveExperts

RoutePart = Literal["logits", "choice", "weights", "contribution"]
ROUTE_PARTS: tuple[RoutePart, ...] = get_args(RoutePart)

Times = Callable[[mx.array, Any], mx.array]

VisitRoute = Callable[[RoutePart, mx.array], mx.array]
"""(part, its value) -> the value that the model goes on with, the same one to leave it.

logits: [..., R]; choice, weights: [..., K]; contribution: [..., K, D]. A layer's parts come in this
order in a forward, the choice always."""


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The live experts as seen outside of the routing taps, which map positions to rows."""

    live: LiveExperts

    def labelled(self, positions: mx.array) -> mx.array:
        """Positions among the live experts as checkpoint numbers."""
        return self.live.labelled(positions)

    def positions(self, experts: mx.array) -> mx.array:
        """The same the other way round; an expert that is not live becomes position 0."""
        if self.live.labels is None:
            return experts
        table = np.zeros(max(self.live.layer.router_rows, max(self.live.live) + 1), np.uint32)
        table[list(self.live.live)] = np.arange(len(self.live.live))
        return mx.array(table)[experts]


class ExpertProbe:
    """Hooks of one MoE layer. wanted: the parts that `visit` is asked about."""

    def __init__(self, live: LiveExperts, visit: VisitRoute, wanted: Collection[RoutePart]) -> None:
        self._experts, self._visit, self._wanted = _Numbered(live), visit, frozenset(wanted)
        self.layer: MoELayer = live.layer
        self._logits: mx.array | None = None
        self._router_weights: mx.array | None = None
        self._products: dict[type[mx.array], type[mx.array]] = {}

    def hook(self, hooks: Hooks) -> None:
        """Add what is needed to `hooks`."""
        layer, facts = self.layer, self.layer.facts
        if "logits" in self._wanted or layer.experts_list or facts.weights_inside:
            if layer.router_kind == "weight":
                hooks.on_attribute(layer.logits, "weight", lambda own: GateWeight(own, self))
            else:
                hooks.on_call(
                    layer.logits, lambda own, x: self.saw_logits(x, own(x)), required=False
                )
        if self._wanted <= {"logits"}:
            return
        if facts.weights_from_router:
            hooks.on_call(layer.router, self._router, required=False)
        if layer.experts_list:
            calls = _ListCalls(self)
            hooks.on_attribute(layer.block, "experts", calls.experts)
            hooks.on_call(layer.block, calls.block, required=False)
        else:
            hooks.on_call(layer.experts, self._call, required=False)

    # -- what the parts pass --------------------------------------------------------------------

    def saw_logits(self, x: mx.array, logits: mx.array) -> mx.array:
        """See Tap.saw_logits."""
        self._logits = self._seen("logits", logits)
        return self._logits

    def _seen(self, part: RoutePart, value: mx.array) -> mx.array:
        if part not in self._wanted:
            return value
        seen = self._visit(part, value)
        return value if seen is value else seen.astype(value.dtype)

    def logits_of(self, leading: Sequence[int]) -> mx.array:
        """The logits of the forward in progress, [*leading, R]; they must have been hooked."""
        if self._logits is None:
            raise HookError(f"no logits were seen at {self.layer.logits}")
        return self._logits.reshape(*leading, -1)

    def choice(self, positions: mx.array) -> mx.array:
        """Let the choice pass; positions among the live experts in and out."""
        labelled = self._experts.labelled(positions)
        seen = self._visit("choice", labelled)
        return positions if seen is labelled else self._experts.positions(seen.astype(mx.uint32))

    def weighted(
        self, y: mx.array, weights: mx.array, times: Times = mx.array.__mul__
    ) -> mx.array | None:
        """The contributions of outputs y [..., K, D] where the visit changed anything, else None
        and the model's own product stands. weights: [..., K]; times: the product as it would be."""
        seen = self._seen("weights", weights)
        if not {"contribution", "weights"} & self._wanted:
            return None
        product = times(y, seen[..., None])
        changed = self._seen("contribution", product)
        return None if changed is product and seen is weights else changed

    # -- stacked experts ------------------------------------------------------------------------

    def _call(self, own: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> Any:
        """SwitchGLU or SwitchMLP."""
        y: mx.array = own(x, self.choice(indices), *args, **kwargs)
        if self.layer.facts.weights_inside:
            return self._inside(indices, y)
        if self.layer.facts.weights_from_router and self._router_weights is not None:
            changed = self._seen(
                "contribution", y * self._router_weights[..., None].astype(y.dtype)
            )
            return self._divided(y, changed)
        y.__class__ = self._product(type(y))
        return y

    def _product(self, base: type[mx.array]) -> type[mx.array]:
        """The class of an output: a subclass of the one that the routing taps gave it, which see
        the product too."""
        if base not in self._products:
            self._products[base] = _product_class(self, base)
        return self._products[base]

    def _inside(self, indices: mx.array, y: mx.array) -> mx.array:
        """llama4 multiplies the experts' input: what they put out is their contribution."""
        if "weights" in self._wanted:
            rows = self.logits_of(indices.shape[:-1])
            self._visit("weights", mx.sigmoid(mx.take_along_axis(rows, indices, axis=-1)))
        return self._seen("contribution", y)

    def _divided(self, y: mx.array, changed: mx.array) -> mx.array:
        """What an output must be for `changed` to be its product with the router's weight."""
        if "contribution" not in self._wanted:
            return y
        assert self._router_weights is not None
        w = self._router_weights[..., None].astype(mx.float32)
        plain = (y * w.astype(y.dtype)).astype(mx.float32)
        other = changed.astype(mx.float32)
        quotient = mx.where(w == 0, 0.0, other / mx.where(w == 0, 1.0, w)).astype(y.dtype)
        return mx.where(plain == other, y, quotient)

    def _router(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """A gate that returns (indices, weights, ...)."""
        indices, weights, *rest = own(*args, **kwargs)
        self._router_weights = self._seen("weights", weights)
        return (indices, self._router_weights, *rest)


def _product_class(probe: ExpertProbe, base: type[mx.array]) -> type[mx.array]:
    """A subclass of `base`, an array, whose product `y * w[..., None]` passes the probe."""

    def passed(y: mx.array, other: Any, own: Times) -> mx.array:
        if isinstance(other, mx.array) and other.ndim == y.ndim and other.shape[-1] == 1:
            changed = probe.weighted(y, other[..., 0], own)
            if changed is not None:
                return changed
        return own(y, other)

    def multiply(self: mx.array, other: Any) -> mx.array:
        return passed(self, other, base.__mul__)

    def reflected(self: mx.array, other: Any) -> mx.array:
        return passed(self, other, base.__rmul__)

    def astype(self: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        result = base.astype(self, *args, **kwargs)
        result.__class__ = product
        return result

    product: type[mx.array] = type(
        "ProbedOutput",
        (base,),
        {"__slots__": (), "__mul__": multiply, "__rmul__": reflected, "astype": astype},
    )
    return product


class _ListCalls:
    """dbrx: its block calls `self.experts[e](x)` token by token, K times each, and adds them up.

    The block runs as it is; where a visit changes something, its output is made again from the
    noted calls. (Its forward reads its choice on the host: it evaluates inside in any case.)
    """

    def __init__(self, probe: ExpertProbe) -> None:
        self._probe = probe
        self._own: Any = None
        self._calls: list[tuple[int, mx.array, mx.array]] = []  # (position, input, output)
        self._running = False

    def experts(self, own: Any) -> Any:
        """What the block reads as its list of experts."""
        if not self._running:
            return own
        self._own = own
        return self

    def block(self, own: Any, x: mx.array) -> mx.array:
        """The block's forward, seen by the probe."""
        self._running = True
        try:
            out: mx.array = own(x)
            return self._again(x, out)
        finally:
            self._running, self._own, self._calls = False, None, []

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: int) -> Callable[[mx.array], mx.array]:
        def call(x: mx.array) -> mx.array:
            y: mx.array = self._own[index](x)
            self._calls.append((index, x, y))
            return y

        return call

    def _again(self, x: mx.array, out: mx.array) -> mx.array:
        """`out`, or the block's output as the visits change it."""
        probe, layer = self._probe, self._probe.layer
        shape = (*x.shape[:-1], layer.top_k)
        chosen = mx.array([index for index, _, _ in self._calls], mx.uint32).reshape(shape)
        outputs = [y for _, _, y in self._calls]
        seen = probe.choice(chosen)
        if seen is not chosen:
            flat = np.array(seen).reshape(-1).tolist()
            inputs = [given for _, given, _ in self._calls]
            outputs = [self._own[e](given) for e, given in zip(flat, inputs, strict=True)]
        y = mx.stack(outputs).reshape(*shape, x.shape[-1])
        changed = probe.weighted(y, self._weights(chosen, x))
        if changed is None:
            if seen is chosen:
                return out
            changed = y * self._weights(chosen, x)[..., None]
        return mx.sum(changed, axis=-2).astype(out.dtype)

    def _weights(self, chosen: mx.array, x: mx.array) -> mx.array:
        """As the block makes them: softmax over all experts, divided by the sum of the chosen."""
        logits = self._probe.logits_of(chosen.shape[:-1])
        gates = mx.softmax(logits.astype(mx.float32), axis=-1)
        scores = mx.take_along_axis(gates, chosen, axis=-1)
        scores = scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)
        return scores.astype(x.dtype)
