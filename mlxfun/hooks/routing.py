"""Hooks that observe and steer routing by swapping the class of leaf modules.

A tapped module keeps its parameters, names and code: its class becomes a dynamic subclass that
looks at what passes. Nothing wraps a module (that would rename parameters) and no model's forward
is copied (copies rot). Everything recorded is lazy; nothing is evaluated inside the forward.

What is tapped, per MoE layer:

* the experts (`SwitchGLU`/`SwitchMLP`): sees the indices, maps them while a prune is virtual, and
  records the output norms. Its output `y` becomes a zero-copy `mx.array` subclass whose product
  with the weights (`y * w[..., None]`) tells the weights exactly as the model applied them;
* the module that makes the logits, where steering acts on them;
* the owner of the selection bias, whose attribute becomes a property while it is steered.

dbrx keeps its experts in a Python list: its block gets a list proxy instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.model.anatomy import Anatomy, MoELayer

if TYPE_CHECKING:
    from mlxfun.arrays import Array

LogitsRule = Callable[[mx.array], mx.array]


@dataclass(slots=True)
class Record:
    """One forward through one MoE layer, lazy.

    indices: [..., K] experts in checkpoint numbers. weights: [..., K] as applied. norms: [..., K]
    float32, the L2 norm of each selected expert's output. logits: [..., R] before steering.
    inputs: [..., D] what the experts were given. router_inputs: [..., D] what the logits are of.
    """

    indices: mx.array
    weights: mx.array | None = None
    norms: mx.array | None = None
    logits: mx.array | None = None
    inputs: mx.array | None = None
    router_inputs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """What must be evaluated with the forward."""
        seen = (self.inputs, self.router_inputs)
        held = (self.indices, self.weights, self.norms, self.logits, *seen)
        return [a for a in held if a is not None]


def output_norms(y: mx.array) -> mx.array:
    """L2 norms [..., K] of expert outputs y [..., K, D], in float32.

    In float32 because bfloat16 sums of squares lose three digits. On a GPU the cast and the square
    are fused, which halves the memory traffic of the largest thing that statistics read; the CPU
    backend gains nothing and would start a compiler.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return _fused_norms(y)
    return _norms(y)


def _norms(y: mx.array) -> mx.array:
    return mx.sqrt(mx.sum(mx.square(y.astype(mx.float32)), axis=-1))


_fused_norms = mx.compile(_norms, shapeless=True)


class LayerTap:
    """What the tapped modules of one MoE layer share: index map, steering, records."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.live: tuple[int, ...] = tuple(range(layer.num_experts))
        self.index_map: mx.array | None = None  # sliced index -> row of the resident stack
        self.rows: tuple[int, ...] = self.live  # the same on the host, for dbrx
        self.labels: mx.array | None = None  # sliced index -> checkpoint number
        self.logits_rule: LogitsRule | None = None
        self.bias: mx.array | None = None  # the steered selection bias
        self.records: list[Record] | None = None
        self.want_norms = True
        self.want_logits = False
        self.want_inputs = False
        self.router_weights: mx.array | None = None
        self.list_calls: list[tuple[int, mx.array]] = []  # dbrx: (sliced index, output) in order
        self._logits: mx.array | None = None  # of the forward in progress, before steering
        self._routed: mx.array | None = None  # the same as the router used them
        self._router_inputs: mx.array | None = None

    def set_experts(self, live: Sequence[int], resident: Sequence[int]) -> None:
        """The live experts, and those physically in the stack, in checkpoint numbers."""
        self.live = tuple(live)
        where = {expert: row for row, expert in enumerate(resident)}
        self.rows = tuple(where[expert] for expert in live)
        identity = self.rows == tuple(range(len(resident)))
        self.index_map = None if identity else mx.array(self.rows, dtype=mx.uint32)
        whole = self.live == tuple(range(self.layer.num_experts))
        self.labels = None if whole else mx.array(self.live, dtype=mx.uint32)
        # Evaluated here, on the owning thread: a lazy array would be built anew in each forward.
        mx.eval([a for a in (self.index_map, self.labels) if a is not None])

    def open(self, x: mx.array, indices: mx.array, y: mx.array) -> Record:
        """Begin a record for a forward that routed `x` to `indices` (sliced numbering)."""
        record = Record(self.labelled(indices))
        if self.want_inputs:
            record.inputs, record.router_inputs = x, self._router_inputs
        if self.want_norms:
            record.norms = output_norms(y)
        if self.want_logits:
            record.logits = self._logits
        if self.layer.facts.weights_inside and self._routed is not None:
            chosen = mx.take_along_axis(self._routed, indices, axis=-1)
            record.weights = mx.sigmoid(chosen.astype(mx.float32))
        if self.layer.facts.weights_from_router:
            record.weights = self.router_weights
        self._logits = self._routed = self._router_inputs = None
        assert self.records is not None
        self.records.append(record)
        return record

    def routed_logits(self) -> mx.array:
        """The logits that the forward in progress routes by (they must have been asked for)."""
        if self._routed is None:
            raise RuntimeError(f"no logits were seen at {self.layer.logits}")
        return self._routed

    def labelled(self, indices: mx.array) -> mx.array:
        """Sliced indices as checkpoint numbers."""
        return indices if self.labels is None else self.labels[indices]

    def saw_logits(self, x: mx.array, logits: mx.array) -> mx.array:
        """Remember the logits of `x` if wanted, and return what the router shall use."""
        routed = logits if self.logits_rule is None else self.logits_rule(logits)
        if self.records is not None and (self.want_logits or self.layer.facts.weights_inside):
            self._logits, self._routed = logits, routed
            self._router_inputs = x if self.want_inputs else None
        return routed


class Taps:
    """The taps of a whole model. `attach` swaps classes, `detach` restores every one."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.layers = tuple(LayerTap(layer) for layer in anatomy.layers)
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._original: list[tuple[nn.Module, type[nn.Module]]] = []

    @property
    def attached(self) -> bool:
        """Whether the model's leaves are tapped at present."""
        return bool(self._original)

    def attach(self) -> None:
        """Swap the classes of every layer's leaves. Idempotent."""
        if self.attached:
            return
        for tap in self.layers:
            for path, features in _features(tap).items():
                module = self._modules[path]
                self._original.append((module, type(module)))
                module.__class__ = _tapped(type(module), features)

    def detach(self) -> None:
        """Give every leaf its own class back."""
        for module, original in reversed(self._original):
            module.__class__ = original
        self._original.clear()

    @contextmanager
    def recording(self, *, norms: bool = True, logits: bool = False) -> Iterator[None]:
        """Record every forward inside the block; read with `drain` after each one."""
        for tap in self.layers:
            tap.records, tap.want_norms, tap.want_logits = [], norms, logits
        try:
            yield
        finally:
            for tap in self.layers:
                tap.records = None

    def drain(self) -> list[list[Record]]:
        """The records since the last drain, per layer [L][forwards]."""
        out: list[list[Record]] = []
        for tap in self.layers:
            out.append(tap.records or [])
            if tap.records is not None:
                tap.records = []
        return out


def stacked_routing(records: Sequence[Sequence[Record]], width: int) -> tuple[Array, Array]:
    """Experts int32 [L, T, K] and weights float32 [L, T, K] of evaluated records.

    T tokens of all forwards in order, K = `width`; unused places are -1 with weight 0 (layers
    with a smaller top-k, and longcat's zero experts, which carry weight 0).
    """
    experts, weights = [], []
    for layer in records:
        inds = [np.array(r.indices).reshape(-1, r.indices.shape[-1]) for r in layer]
        used = [_host_weights(r).reshape(-1, r.indices.shape[-1]) for r in layer]
        i, w = np.concatenate(inds).astype(np.int32), np.concatenate(used)
        i[w == 0] = -1
        pad = ((0, 0), (0, width - i.shape[-1]))
        experts.append(np.pad(i, pad, constant_values=-1))
        weights.append(np.pad(w, pad))
    return np.stack(experts), np.stack(weights)


def _host_weights(record: Record) -> Array:
    if record.weights is None:
        return np.ones(record.indices.shape, np.float32)
    return np.array(record.weights.astype(mx.float32))


# -- dynamic classes --------------------------------------------------------------------------


def _tapped(original: type[nn.Module], features: list[tuple[type, dict[str, Any]]]) -> Any:
    """A subclass of `original` with the mixins and class attributes of `features`."""
    namespace: dict[str, Any] = {"__module__": original.__module__}
    for _, attributes in features:
        namespace.update(attributes)
    mixins = tuple(mixin for mixin, _ in features)
    return type(original.__name__, (*mixins, original), namespace)


def _features(tap: LayerTap) -> dict[str, list[tuple[type, dict[str, Any]]]]:
    """What to swap, per module path, for one layer."""
    layer = tap.layer
    out: dict[str, list[tuple[type, dict[str, Any]]]] = {}

    def add(path: str, mixin: type, **attributes: Any) -> None:
        out.setdefault(path, []).append((mixin, {"_tap": tap, **attributes}))

    if layer.experts_list:
        add(layer.block, _ListBlockTap)
    else:
        add(layer.experts, _ExpertsTap, _product=_product_class(tap))
    if layer.router_kind == "weight":
        add(layer.logits, _WeightTap)
    else:
        add(layer.logits, _LinearTap)
    if layer.facts.weights_from_router:
        add(layer.router, _RouterTap)
    if layer.bias_owner is not None and layer.bias_name is not None:
        name = layer.bias_name
        add(layer.bias_owner, _BiasTap, **{name: _bias_property(tap, name)})
    return out


class _ExpertsTap:
    """SwitchGLU/SwitchMLP: map indices, record, and make `y` tell its weights."""

    _tap: LayerTap
    _product: type[mx.array]

    def __call__(self, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        tap = self._tap
        rows = indices if tap.index_map is None else tap.index_map[indices]
        y: mx.array = super().__call__(x, rows, *args, **kwargs)  # type: ignore[misc]
        if tap.records is not None:
            tap.open(x, indices, y)
            y.__class__ = self._product
        return y


def _product_class(tap: LayerTap) -> type[mx.array]:
    """An `mx.array` subclass that notes the operand of `y * w[..., None]` in the open record."""

    def note(y: mx.array, other: Any) -> None:
        if (
            tap.records
            and isinstance(other, mx.array)
            and other.ndim == y.ndim
            and other.shape[-1] == 1
            and tap.records[-1].weights is None
        ):
            tap.records[-1].weights = other[..., 0]

    def multiply(self: mx.array, other: Any) -> mx.array:
        note(self, other)
        return mx.array.__mul__(self, other)

    def reflected(self: mx.array, other: Any) -> mx.array:
        note(self, other)
        return mx.array.__rmul__(self, other)

    def astype(self: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        result = mx.array.astype(self, *args, **kwargs)
        result.__class__ = product
        return result

    product: type[mx.array] = type(
        "ExpertOutput",
        (mx.array,),
        {"__slots__": (), "__mul__": multiply, "__rmul__": reflected, "astype": astype},
    )
    return product


class _LinearTap:
    """The Linear or QuantizedLinear whose output are the router's logits."""

    _tap: LayerTap

    def __call__(self, x: mx.array) -> mx.array:
        return self._tap.saw_logits(x, super().__call__(x))  # type: ignore[misc]


class _RouterTap:
    """A gate module that returns (indices, weights): keep the weights for the open record."""

    _tap: LayerTap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)  # type: ignore[misc]
        self._tap.router_weights = result[1]
        return result


class _WeightTap:
    """A gate module that computes `x @ self.weight.T` itself."""

    _tap: LayerTap

    @property
    def weight(self) -> Any:
        own = self["weight"]  # type: ignore[index]
        tap = self._tap
        if tap.logits_rule is None and not (tap.records is not None and tap.want_logits):
            return own
        return _WatchedWeight(own, tap)


class _WatchedWeight:
    """Stands for a gate's weight in `x @ weight.T`, so that the product passes the tap."""

    def __init__(self, weight: mx.array, tap: LayerTap) -> None:
        self._weight, self._tap = weight, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    def astype(self, dtype: mx.Dtype) -> _WatchedWeight:
        return _WatchedWeight(self._weight.astype(dtype), self._tap)

    @property
    def T(self) -> mx.array:  # noqa: N802 - the name that gates use
        tap, plain = self._tap, self._weight.T

        def product(_: mx.array, x: mx.array) -> mx.array:
            return tap.saw_logits(x, x @ plain)

        # Python asks the right operand first when its class is a subclass of the left one's.
        watched = self._weight.T
        watched.__class__ = type(
            "GateWeight", (mx.array,), {"__slots__": (), "__rmatmul__": product}
        )
        return watched


class _BiasTap:
    """The owner of the selection bias; the property itself is made per attribute name."""


def _bias_property(tap: LayerTap, name: str) -> property:
    def read(module: Any) -> Any:
        return module[name] if tap.bias is None else tap.bias

    return property(read)


class _ListBlockTap:
    """dbrx: `self.experts[e](x)` per token and place; the proxy maps and records."""

    _tap: LayerTap

    @property
    def experts(self) -> Any:
        tap = self._tap
        own = self["experts"]  # type: ignore[index]
        if tap.index_map is None and tap.records is None:
            return own
        return _ExpertList(own, tap)

    def __call__(self, x: mx.array) -> mx.array:
        tap = self._tap
        if tap.records is None:
            return super().__call__(x)  # type: ignore[misc,no-any-return]
        want, tap.want_logits = tap.want_logits, True
        tap.list_calls = []
        try:
            out: mx.array = super().__call__(x)  # type: ignore[misc]
        finally:
            tap.want_logits = want
        self._record(x)
        tap.list_calls = []
        return out

    def _record(self, x: mx.array) -> None:
        tap, calls = self._tap, self._tap.list_calls
        shape = (*x.shape[:-1], tap.layer.top_k)
        indices = mx.array([e for e, _ in calls], dtype=mx.uint32).reshape(shape)
        y = mx.stack([out for _, out in calls]).reshape(*shape, x.shape[-1])
        logits = tap.routed_logits()
        record = tap.open(x, indices, y)
        # The same operations in the same order as the block's own (l1-renormalised softmax).
        gates = mx.softmax(logits.reshape(*x.shape[:-1], -1).astype(mx.float32), axis=-1)
        scores = mx.take_along_axis(gates, indices, axis=-1)
        scores = scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)
        record.weights = scores.astype(x.dtype)


class _ExpertList:
    """A list of experts that maps indices and notes every call."""

    def __init__(self, experts: list[nn.Module], tap: LayerTap) -> None:
        self._experts, self._tap = experts, tap

    def __len__(self) -> int:
        return len(self._tap.rows)

    def __getitem__(self, index: int) -> Callable[[mx.array], mx.array]:
        expert = self._experts[self._tap.rows[index]]
        if self._tap.records is None:
            return expert

        def call(x: mx.array) -> mx.array:
            y: mx.array = expert(x)
            self._tap.list_calls.append((index, y))
            return y

        return call
