"""Forwards of many batches, carried through the decoder layers one layer at a time.

Every layer's own arguments (masks, rotary tables) are recorded once, by a forward in which each
decoder layer is an identity, and replayed with the hidden states that the layer before it made. So
each layer is needed once for all batches: a model that is larger than memory is read once.

Some models hand more than hidden states from layer to layer. Whether replaying is faithful is
tested on one sequence, bit for bit (`Replay.obstacle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.states import States
from mlxfun.model.anatomy.layers import decoder_layers, in_order
from mlxfun.model.anatomy.types import MoEMap
from mlxfun.model.places import LayerStore

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlxfun.data.datasets import Tokens

Handler = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(number of the module, its own forward, positional arguments, keyword arguments) -> output."""

Forward = Callable[[], object]

# What a model raises when its layers return more than hidden states and get an identity instead.
STUB_ERRORS = (TypeError, ValueError, AttributeError, IndexError, KeyError)

OTHER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one decoder layer in one forward, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Travel:
    """One batch on its way: where its hidden states are kept, every layer's arguments, and what is
    remembered.

    ahead: (number of the child module, output) of what ran ahead of the MoE block, in order.
    """

    number: int
    calls: list[Call]
    ahead: list[tuple[int, Any]] = field(default_factory=list)


class NotReplayable(Exception):
    """This model's layers cannot be run one by one; the text says why."""


class Replay:
    """Batches on their way through a model, all of them behind the same layer.

    obstacle: why the model is run again for every layer, None where layers are replayed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        forwards: Sequence[Forward],
        probe: Tokens,
        ctx: Context = SILENT,
    ) -> None:
        """Record the arguments of every layer.

        layers: all decoder layers. forwards: each runs the model once, on one batch. probe: int [T],
        one sequence to test with.
        """
        self._model: Any = model
        self.store = LayerStore.of(model)
        self.states = States(None if self.store is None else self.store.scratch)
        self.next = 0
        self.travels: list[Travel] = []
        self.layers = list(layers)
        self.obstacle: str | None = None
        try:
            self._require_known_faithful(probe)
            for number, forward in enumerate(forwards):
                ctx.check()
                hidden, calls = self._record(forward)
                self.states.put(number, hidden)
                self.travels.append(Travel(number, calls))
                ctx.progress("recording layer arguments", number + 1, len(forwards), "batches")
        except NotReplayable as reason:
            self.obstacle, self.travels = str(reason), []

    # -- recording ----------------------------------------------------------------------------

    def _record(self, forward: Forward) -> tuple[mx.array, list[Call]]:
        """What enters the first decoder layer in a forward, and the arguments of all."""
        entered: list[mx.array] = []
        calls: list[Call] = []
        order: list[int] = []

        def note(number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or not isinstance(args[0], mx.array):
                raise NotReplayable("its layers do not take hidden states first")
            order.append(number)
            entered.append(args[0])
            calls.append(Call(args[1:], kwargs))
            return args[0]

        try:
            with intercepting(self.layers, note):
                forward()
        except STUB_ERRORS as error:
            raise NotReplayable(f"its layers return more than hidden states ({error})") from error
        if order != list(range(len(self.layers))):
            raise NotReplayable("its layers do not run once each, in order")
        mx.eval([entered[0]], [[call.args, call.kwargs] for call in calls])
        return entered[0], calls

    def _require_known_faithful(self, probe: Tokens) -> None:
        """`_require_faithful`, once for a model that has to be read for it."""
        tokens = mx.array(probe)[None]
        if self.store is None:
            self._require_faithful(tokens)
            return
        if self.store.verdict is None:
            try:
                self._require_faithful(tokens)
                self.store.verdict = ""
            except NotReplayable as reason:
                self.store.verdict = str(reason)
        if self.store.verdict:
            raise NotReplayable(self.store.verdict)

    def _require_faithful(self, tokens: mx.array) -> None:
        """Compare a replay with the plain forward, bit for bit, on one sequence.

        Another sequence passes each layer after it, as in a pass over batches: what a layer leaves
        in itself for a later one would be that of the other.
        """
        seen: list[Any] = []

        def watch(_: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = own(*args, **kwargs)
            seen.append(out)
            return out

        hidden = self._replayed([tokens, tokens[:, ::-1][:, :OTHER_TOKENS]])
        with intercepting(self.layers[-1:], watch):
            self._model(tokens)
        if not mx.array_equal(hidden, seen[-1], equal_nan=True).item():
            raise NotReplayable("its layers hand on more than hidden states")

    def _replayed(self, sequences: Sequence[mx.array]) -> mx.array:
        """What is behind the last layer of the first of `sequences`."""
        states: list[tuple[Any, list[Call]]] = [
            self._record(partial(self._model, tokens)) for tokens in sequences
        ]
        for number, layer in enumerate(self.layers):
            with self.reading(number):
                for place, (hidden, calls) in enumerate(states):
                    states[place] = self._passed(layer, hidden, calls[number]), calls
                mx.eval([hidden for hidden, _ in states])
        found: mx.array = states[0][0]
        return found

    def _passed(self, layer: Any, hidden: mx.array, call: Call) -> mx.array:
        try:
            out = layer(hidden, *call.args, **call.kwargs)
        except STUB_ERRORS as error:
            raise NotReplayable(f"a layer needs what another one left ({error})") from error
        if not isinstance(out, mx.array):
            raise NotReplayable("its layers return more than hidden states")
        return out

    # -- moving -------------------------------------------------------------------------------

    def reading(self, number: int) -> AbstractContextManager[None]:
        """Decoder layer `number` is in memory inside the block."""
        return nullcontext() if self.store is None else self.store.layer(number)

    def arrive(self, decoder_layer: int, ctx: Context = SILENT) -> None:
        """Run every layer ahead of `decoder_layer`, as edited by now, on all batches."""
        if self.obstacle is not None:
            return
        while self.next < decoder_layer:
            with self.reading(self.next):
                for travel in self.travels:
                    ctx.check()
                    self.advance(travel)
                self.next += 1

    def advance(self, travel: Travel) -> None:
        """Run the next layer on one batch."""
        layer, call = self.layers[self.next], travel.calls[self.next]
        left = iter(travel.ahead)
        pending = next(left, None)

        def recall(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal pending
            if pending is None:
                return own(*args, **kwargs)
            if pending[0] != number:
                raise RuntimeError(f"decoder layer {self.next} ran in another order than before")
            _, out = pending
            pending = next(left, None)
            return out

        with intercepting(children(layer) if pending else [], recall):
            hidden = layer(self.states.get(travel.number), *call.args, **call.kwargs)
        # All that is lazy keeps the layer's weights alive.
        mx.eval(hidden, cache_states(*call.args, *call.kwargs.values()))
        travel.ahead = []
        self.states.put(travel.number, hidden)

    @contextmanager
    def behind(self, travel: Travel) -> Iterator[None]:
        """Forwards of that batch inside the block have run all layers already."""

        # Emptied at the end: a hook's class, and what it refers to, waits for the garbage collector.
        held = [self.states.get(travel.number)]
        with intercepting(self.layers, lambda *_: held[0]):
            try:
                yield
            finally:
                held.clear()


def all_layers(model: nn.Module, anatomy: MoEMap) -> list[nn.Module]:
    """Every decoder layer, MoE or not, in order."""
    modules = in_order(model)
    return [modules[layer.path] for layer in decoder_layers(modules, anatomy)]


@contextmanager
def passing_layers(model: nn.Module, anatomy: MoEMap) -> Iterator[None]:
    """Decoder layers hand on what they are given inside the block, and are not read for it.

    A model whose layers return more than hidden states raises one of `STUB_ERRORS` then.
    """
    with intercepting(all_layers(model, anatomy), lambda _, __, args, ___: args[0]):
        yield


def cache_states(*arguments: Any) -> list[Any]:
    """What the caches among the arguments of a layer hold by now."""
    found = []
    for value in arguments:
        # A cache that this layer has not filled has no state yet.
        with suppress(AttributeError, TypeError, IndexError):
            found.append(value.state)
    return found


def children(layer: nn.Module) -> list[nn.Module]:
    """Direct child modules of a layer, and those in its lists; each once."""
    found: list[nn.Module] = []
    for value in layer.values():
        found += [m for m in (value if isinstance(value, list) else [value]) if _is_module(m)]
    return list({id(module): module for module in found}.values())


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


@contextmanager
def intercepting(modules: Sequence[nn.Module], handler: Handler) -> Iterator[None]:
    """Let `handler` answer the calls of `modules` inside the block."""
    hooks = Hooks({str(number): module for number, module in enumerate(modules)})
    for number in range(len(modules)):
        hooks.on_call(str(number), _numbered(number, handler), required=False)
    with hooks:
        yield


def _numbered(number: int, handler: Handler) -> Callable[..., Any]:
    def call(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return handler(number, own, args, kwargs)

    return call
