"""Forwards of many batches, carried through the decoder layers one layer at a time.

Every layer's own arguments (masks, rotary tables) are recorded once, by a forward in which each
decoder layer is an identity, and replayed with the hidden states that the layer before it made. So
each layer is needed once for all batches: a model that is larger than memory is read once.

Some models hand more than hidden states from layer to layer. Whether replaying is faithful is
tested on one sequence, bit for bit (`Replay.obstacle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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

    from mlxfun.data.datasets import Batch

Handler = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(number of the module, its own forward, positional arguments, keyword arguments) -> output."""

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
        self, model: nn.Module, anatomy: MoEMap, batches: Sequence[Batch], ctx: Context = SILENT
    ) -> None:
        """Record the arguments of every layer."""
        self._model: Any = model
        self._batches = tuple(batches)
        self.store = LayerStore.of(model)
        self.states = States(None if self.store is None else self.store.scratch)
        self.next = 0
        self.travels: list[Travel] = []
        self.obstacle: str | None = None
        try:
            modules = in_order(model)
            self.layers = [modules[layer.path] for layer in decoder_layers(modules, anatomy)]
            self._require_known_faithful()
            for number, batch in enumerate(self._batches):
                ctx.check()
                hidden, calls = self._record(mx.array(batch.tokens))
                self.states.put(number, hidden)
                self.travels.append(Travel(number, calls))
                ctx.progress("recording layer arguments", number + 1, len(batches), "batches")
        except NotReplayable as reason:
            self.obstacle, self.travels = str(reason), []

    # -- recording ----------------------------------------------------------------------------

    def _record(self, tokens: mx.array) -> tuple[mx.array, list[Call]]:
        """What enters the first decoder layer, and the arguments of all, on `tokens`, int [B, T]."""
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
                self._model(tokens)
        except STUB_ERRORS as error:
            raise NotReplayable(f"its layers return more than hidden states ({error})") from error
        if order != list(range(len(self.layers))):
            raise NotReplayable("its layers do not run once each, in order")
        mx.eval([entered[0]], [[call.args, call.kwargs] for call in calls])
        return entered[0], calls

    def _require_known_faithful(self) -> None:
        """`_require_faithful`, once for a model that has to be read for it."""
        tokens = mx.array(self._batches[0].tokens[:1])
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
        states: list[tuple[Any, list[Call]]] = [self._record(tokens) for tokens in sequences]
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
        mx.eval(hidden)
        travel.ahead = []
        self.states.put(travel.number, hidden)

    @contextmanager
    def behind(self, travel: Travel) -> Iterator[None]:
        """Forwards of that batch inside the block have run all layers already."""

        def answer(*_: Any) -> mx.array:
            return hidden

        hidden = self.states.get(travel.number)
        with intercepting(self.layers, answer):
            yield


@contextmanager
def passing_layers(model: nn.Module, anatomy: MoEMap) -> Iterator[None]:
    """Decoder layers hand on what they are given inside the block, and are not read for it.

    A model whose layers return more than hidden states raises one of `STUB_ERRORS` then.
    """
    modules = in_order(model)
    layers = [modules[layer.path] for layer in decoder_layers(modules, anatomy)]
    with intercepting(layers, lambda _, __, args, ___: args[0]):
        yield


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
