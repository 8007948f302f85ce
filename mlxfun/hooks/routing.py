"""Observes and steers the routing of MoE layers, through hooks on their leaf modules.

What is hooked, per MoE layer:

* the experts (`SwitchGLU`/`SwitchMLP`): sees the indices, maps them while a prune is virtual, and
  records the output norms. Its output `y` becomes a zero-copy `mx.array` subclass whose product
  with the weights (`y * w[..., None]`) tells the weights exactly as the model applied them;
* the module that makes the logits, where steering acts on them;
* the owner of the selection bias, whose attribute is read through the tap while it is steered.

dbrx keeps its experts in a Python list: its block gets a list proxy instead.

Everything recorded is lazy, and nothing is evaluated inside the forward, with one bounded
exception that a client asks for: `Taps.reducing` schedules a layer's small sums as they arise.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import HookError
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.pace import Pace
from mlxfun.hooks.routers import hook_layer
from mlxfun.hooks.step_routing import Stepping, output_norms, output_peaks, require_all
from mlxfun.model.anatomy import MoELayer, MoEMap
from mlxfun.model.live_experts import LiveExperts

LogitsRule = Callable[[mx.array], mx.array]


@dataclass(slots=True)
class Record:
    """One forward through one MoE layer, lazy.

    indices: [..., K] experts in checkpoint numbers. weights: [..., K] as applied. norms: [..., K]
    float32, the L2 norm of each selected expert's output; peaks: [..., K] float32, the largest
    absolute value in it. logits: [..., R] before steering.
    inputs: [..., D] what the experts were given. router_inputs: [..., D] what the logits are of.
    """

    indices: mx.array
    weights: mx.array | None = None
    norms: mx.array | None = None
    peaks: mx.array | None = None
    logits: mx.array | None = None
    inputs: mx.array | None = None
    router_inputs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """What must be evaluated with the forward."""
        seen = (self.inputs, self.router_inputs)
        held = (self.indices, self.weights, self.norms, self.peaks, self.logits, *seen)
        return [a for a in held if a is not None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client wants recorded of each forward; see Record."""

    norms: bool = True
    logits: bool = False
    inputs: bool = False
    peaks: bool = False


class Client(Protocol):
    """Who is told of records while a recording is on."""

    wanted: Wanted

    def opened(self, tap: LayerTap, record: Record) -> None:
        """A layer has routed; its weights may not be known yet."""

    def completed(self, tap: LayerTap, record: Record) -> None:
        """The weights of the record are known."""


class LayerTap:
    """What the hooks of one MoE layer share: the live experts, steering, and who records."""

    def __init__(self, experts: LiveExperts) -> None:
        self.experts = experts
        facts = experts.layer.facts
        self._position = experts.layer.position
        # Where the weights come from that the experts' output is not multiplied with.
        self._weights_elsewhere = facts.weights_inside or facts.weights_from_router
        self._inside = facts.weights_inside or experts.layer.experts_list
        self.logits_rule: LogitsRule | None = None
        self.bias: mx.array | None = None  # the steered selection bias
        self.clients: list[Client] = []
        self.step: Stepping | None = None
        self.observed = False  # whether anyone is told of forwards; read once a layer and token
        self._wanted = Wanted(False, False, False)  # by any of the clients
        self.present: mx.array | None = (
            None  # bool [..., K]: the choices of this forward that are not left out
        )
        self._router_weights: mx.array | None = None
        self._awaited = False  # whether the weights of the forward in progress are not known yet
        self._record: Record | None = None  # of the forward in progress
        self._logits: mx.array | None = None  # of the forward in progress, before steering
        self._routed: mx.array | None = None  # the same as the router used them
        self._router_inputs: mx.array | None = None

    @property
    def layer(self) -> MoELayer:
        """The layer's description."""
        return self.experts.layer

    @property
    def live(self) -> tuple[int, ...]:
        """The live experts in checkpoint numbers."""
        return self.experts.live

    def listen(self, clients: list[Client], step: Stepping | None) -> None:
        """Who is told of the next forwards."""
        self.clients, self.step = clients, step
        self.observed = step is not None or bool(clients)
        wanted = [client.wanted for client in clients]
        self._wanted = Wanted(
            any(w.norms for w in wanted),
            any(w.logits for w in wanted),
            any(w.inputs for w in wanted),
            any(w.peaks for w in wanted),
        )

    @property
    def watches_logits(self) -> bool:
        """Whether the logits of a forward must pass the tap."""
        if self.logits_rule is not None or self._wanted.logits:
            return True
        return self._inside and self.observed

    def open(
        self, x: mx.array, indices: mx.array, y: mx.array, mapped: mx.array | None = None
    ) -> None:
        """A forward has routed `x` to `indices`, positions among the live experts.

        mapped: the same as rows of the resident stack. Decoding passes here once per layer and
        token while the device waits for work, so what a step does not need comes after it.
        """
        labelled = self.experts.labelled(indices, mapped)
        self._awaited = True
        if self.step is not None:
            self.step.opened(self._position, labelled, y)
            if not (self.clients or self._weights_elsewhere):
                return
        self._record = self._recorded(x, labelled, y) if self.clients else None
        if self.layer.facts.weights_inside and self._routed is not None:
            chosen = mx.take_along_axis(self._routed, indices, axis=-1)
            self.complete(mx.sigmoid(chosen.astype(mx.float32)))
        elif self.layer.facts.weights_from_router and self._router_weights is not None:
            self.complete(self._router_weights)
        self._logits = self._routed = self._router_inputs = self._router_weights = None

    def _recorded(self, x: mx.array, indices: mx.array, y: mx.array) -> Record:
        record = Record(indices)
        if self._wanted.inputs:
            record.inputs, record.router_inputs = x, self._router_inputs
        if self._wanted.norms:
            record.norms = output_norms(y)
        if self._wanted.peaks:
            record.peaks = output_peaks(y)
        if self._wanted.logits:
            record.logits = self._logits
        for client in self.clients:
            client.opened(self, record)
        return record

    def complete(self, weights: mx.array) -> None:
        """The weights [..., K] that the experts were applied with; the first that are seen count."""
        if not self._awaited:
            return
        self._awaited = False
        if self.step is not None:
            self.step.weights[self._position] = weights
        record, self._record = self._record, None
        if record is not None:
            record.weights = weights
            for client in self.clients:
                client.completed(self, record)

    def multiplied(self, factor: mx.array) -> None:
        """The experts' output was multiplied with `factor` [..., K, 1], their weights."""
        if not self._awaited:
            return
        if self.step is not None and not self.clients:
            # As it is: a step is flattened when it is stacked.
            self._awaited = False
            self.step.weights[self._position] = factor
        else:
            self.complete(factor[..., 0])

    def routed_logits(self) -> mx.array:
        """The logits that the forward in progress routes by (they must have been asked for)."""
        if self._routed is None:
            raise HookError(f"no logits were seen at {self.layer.logits}")
        return self._routed

    def saw_logits(self, x: mx.array, logits: mx.array) -> mx.array:
        """Remember the logits of `x` if wanted, and return what the router shall use."""
        routed = logits if self.logits_rule is None else self.logits_rule(logits)
        if self.observed and self.watches_logits:
            self._logits, self._routed = logits, routed
            self._router_inputs = x if self._wanted.inputs else None
        return routed

    def saw_router(self, weights: mx.array) -> None:
        """What a router returned as weights [..., K]."""
        self._router_weights = weights


@dataclass(slots=True)
class Recording:
    """The records of the forwards since the last drain. See Client."""

    wanted: Wanted
    positions: tuple[int, ...]
    _records: dict[int, list[Record]] = field(default_factory=dict)

    def opened(self, tap: LayerTap, record: Record) -> None:
        self._records.setdefault(tap.layer.position, []).append(record)

    def completed(self, tap: LayerTap, record: Record) -> None:
        pass

    def drain(self) -> list[list[Record]]:
        """The records since the last drain, [recorded layers][forwards].

        Raises HookError for a layer that no forward reached while others were.
        """
        records, self._records = self._records, {}
        if records:
            require_all(self.positions, records)
        return [records.get(position, []) for position in self.positions]


Reduce = Callable[["LayerTap", Record], mx.array]
Join = Callable[[mx.array, mx.array], mx.array]


@dataclass(slots=True)
class Reduction:
    """Each layer's record reduced to a small array as soon as it is complete. See Taps.reducing."""

    wanted: Wanted
    positions: tuple[int, ...]
    reduce: Reduce
    join: Join = operator.add
    seen: dict[int, list[mx.array]] = field(default_factory=dict)
    _pace: Pace = field(default_factory=Pace)

    def opened(self, tap: LayerTap, record: Record) -> None:
        pass

    def completed(self, tap: LayerTap, record: Record) -> None:
        reduced = self.reduce(tap, record)
        self._pace(reduced)
        self.seen.setdefault(tap.layer.position, []).append(reduced)

    def drain(self) -> list[mx.array]:
        """The reduced arrays since the last drain, [L], those of several forwards joined.

        Raises HookError for a layer whose weights no forward showed.
        """
        arrays = dict(self.seen)
        self.seen.clear()
        self._pace.end()
        require_all(self.positions, arrays)
        return [functools.reduce(self.join, arrays[position]) for position in self.positions]


class Taps:
    """The taps of a whole model. `attach` puts the hooks in place, `detach` removes them."""

    def __init__(self, model: nn.Module, anatomy: MoEMap, experts: Sequence[LiveExperts]) -> None:
        self.anatomy = anatomy
        self.layers = tuple(LayerTap(live) for live in experts)
        self._hooks = Hooks(dict(model.named_modules()))
        for tap in self.layers:
            hook_layer(self._hooks, tap)

    @property
    def attached(self) -> bool:
        """Whether the model's leaves are hooked at present."""
        return self._hooks.attached

    def attach(self) -> None:
        """Hook every layer's leaves. Idempotent."""
        self._hooks.attach()

    def detach(self) -> None:
        """Give every leaf its own class back."""
        self._hooks.detach()

    @contextmanager
    def recording(
        self,
        *,
        norms: bool = True,
        logits: bool = False,
        inputs: bool = False,
        peaks: bool = False,
        positions: Sequence[int] | None = None,
    ) -> Iterator[Recording]:
        """Record every forward inside the block; read with `drain` after each one.

        positions: only these MoE layers, all by default. Recordings nest: each has its own records.
        """
        wanted = Wanted(norms, logits, inputs, peaks)
        recording = Recording(wanted, self._positions(positions))
        with self.telling(recording):
            yield recording

    def reduction(
        self, reduce: Reduce, *, norms: bool = True, peaks: bool = False, join: Join = operator.add
    ) -> Reduction:
        """Reduces each layer's record to a small array, and schedules that as it arises, of the
        forwards inside `telling`.

        For forwards over many tokens: see Reduction. Not for decoding, where the schedule would
        stall the pipeline. reduce: (tap, record) -> array, without evaluating anything. join: of
        two forwards' arrays of one layer.
        """
        return Reduction(Wanted(norms, peaks=peaks), self._positions(None), reduce, join)

    @contextmanager
    def reducing(self, reduce: Reduce, *, norms: bool = True) -> Iterator[Reduction]:
        """A `reduction` that is told of every forward inside the block."""
        reduction = self.reduction(reduce, norms=norms)
        with self.telling(reduction):
            yield reduction

    @contextmanager
    def stepping(self, *, norms: bool = False, rows: int = 1) -> Iterator[Stepping]:
        """Collect the routing of one forward over one token of each row inside the block, for
        decoding.

        Costs less on the host than a recording, and is stacked to one array of each kind.
        """
        stepping = Stepping(self.anatomy.top_k, len(self.layers), norms, rows)
        before = [tap.step for tap in self.layers]
        for tap in self.layers:
            tap.step, tap.observed = stepping, True
        try:
            yield stepping
        finally:
            for tap, step in zip(self.layers, before, strict=True):
                tap.step, tap.observed = step, step is not None or bool(tap.clients)

    def _positions(self, positions: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(range(len(self.layers))) if positions is None else tuple(positions)

    @contextmanager
    def telling(self, client: Recording | Reduction) -> Iterator[None]:
        """`client` is told of every forward inside the block."""
        taps = [self.layers[position] for position in client.positions]
        for tap in taps:
            tap.listen([*tap.clients, client], tap.step)
        try:
            yield
        finally:
            for tap in taps:
                tap.listen([other for other in tap.clients if other is not client], tap.step)
