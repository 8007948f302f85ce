"""Layer-by-layer replay: hidden states of a calibration set, carried through the decoder layers in
one pass.

Every layer's own arguments (masks, rotary tables) are recorded once, by a forward in which each
decoder layer is an identity, and replayed with the hidden states that the layer before it made.
Editing a layer before moving on lets all later layers see the edited model, at the cost of one
pass over the layers instead of one forward per layer.

What a layer computes ahead of its MoE block (attention, norms) does not depend on the experts: it
is remembered while observing and given back when the edited layer runs.

Some models hand more than hidden states from layer to layer. Whether replaying is faithful is
tested on a short sequence, bit for bit; where it is not, each layer is observed by a forward of
the whole model, of which lazy evaluation computes only the part up to that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.model.anatomy.layers import decoder_layers, in_order

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch

Handler = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(number of the module, its own forward, positional arguments, keyword arguments) -> output."""

# What a model raises when its layers return more than hidden states and get an identity instead.
_STUB_ERRORS = (TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one decoder layer in one forward. hidden: [B, T, D] as it came in."""

    hidden: mx.array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class _Travel:
    """One batch on its way: its hidden states, every layer's arguments, and what is remembered.

    ahead: (number of the child module, output) of what ran ahead of the MoE block, in order.
    """

    hidden: mx.array
    calls: list[_Call]
    ahead: list[tuple[int, Any]] = field(default_factory=list)


class _NotReplayable(Exception):
    """This model's layers cannot be run one by one; the text says why."""


class Carrier:
    """Calibration batches on their way through a model whose layers are edited as they pass.

        for position in range(L):
            for batch, records in carrier.observe(position): ...
            edit the layer; `arrive` runs it edited when the next one is observed

    obstacle: why the model is run again for every layer, None where layers are replayed.
    """

    def __init__(
        self, model: nn.Module, taps: Taps, batches: Sequence[Batch], ctx: Context = SILENT
    ) -> None:
        """Record the arguments of every layer. Taps must be attached."""
        self._model: Any = model
        self._taps = taps
        self._batches = tuple(batches)
        self._next = 0
        self._travels: list[_Travel] = []
        self.obstacle: str | None = None
        try:
            self._layers = _decoder_layers(model, taps)
            self._require_faithful(mx.array(self._batches[0].tokens[:1]))
            for number, batch in enumerate(self._batches):
                ctx.check()
                calls = self._record(mx.array(batch.tokens))
                self._travels.append(_Travel(calls[0].hidden, calls))
                ctx.progress("recording layer arguments", number + 1, len(batches), "batches")
        except _NotReplayable as reason:
            self.obstacle, self._travels = str(reason), []

    # -- recording ----------------------------------------------------------------------------

    def _record(self, tokens: mx.array) -> list[_Call]:
        """The arguments of every decoder layer on `tokens`, int [B, T]."""
        calls: list[_Call] = []
        order: list[int] = []

        def note(number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or not isinstance(args[0], mx.array):
                raise _NotReplayable("its layers do not take hidden states first")
            order.append(number)
            calls.append(_Call(args[0], args[1:], kwargs))
            return args[0]

        try:
            with intercepting(self._layers, note):
                self._model(tokens)
        except _STUB_ERRORS as error:
            raise _NotReplayable(f"its layers return more than hidden states ({error})") from error
        if order != list(range(len(self._layers))):
            raise _NotReplayable("its layers do not run once each, in order")
        mx.eval([calls[0].hidden], [[call.args, call.kwargs] for call in calls])
        return calls

    def _require_faithful(self, tokens: mx.array) -> None:
        """Compare a replay with the plain forward, bit for bit, on one sequence."""
        seen: list[Any] = []

        def watch(_: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = own(*args, **kwargs)
            seen.append(out)
            return out

        calls = self._record(tokens)
        hidden: Any = calls[0].hidden
        for layer, call in zip(self._layers, calls, strict=True):
            try:
                hidden = layer(hidden, *call.args, **call.kwargs)
            except _STUB_ERRORS as error:
                raise _NotReplayable(f"a layer needs what another one left ({error})") from error
            if not isinstance(hidden, mx.array):
                raise _NotReplayable("its layers return more than hidden states")
        with intercepting(self._layers[-1:], watch):
            self._model(tokens)
        if not mx.array_equal(hidden, seen[-1], equal_nan=True).item():
            raise _NotReplayable("its layers hand on more than hidden states")

    # -- moving -------------------------------------------------------------------------------

    def arrive(self, decoder_layer: int, ctx: Context = SILENT) -> None:
        """Run every layer ahead of `decoder_layer`, as edited by now, on all batches."""
        if self.obstacle is not None:
            return
        while self._next < decoder_layer:
            for travel in self._travels:
                ctx.check()
                self._advance(travel)
            self._next += 1

    def _advance(self, travel: _Travel) -> None:
        layer, call = self._layers[self._next], travel.calls[self._next]
        left = iter(travel.ahead)
        pending = next(left, None)

        def recall(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal pending
            if pending is None:
                return own(*args, **kwargs)
            if pending[0] != number:
                raise RuntimeError(f"decoder layer {self._next} ran in another order than before")
            _, out = pending
            pending = next(left, None)
            return out

        with intercepting(_children(layer), recall):
            travel.hidden = layer(travel.hidden, *call.args, **call.kwargs)
        mx.eval(travel.hidden)
        travel.ahead = []

    def observe(
        self, position: int, ctx: Context = SILENT
    ) -> Iterator[tuple[Batch, Sequence[Record]]]:
        """The records of MoE layer `position` for each batch, with inputs, norms and logits, lazy.

        Evaluate what is needed of a batch's records before asking for the next batch.
        """
        tap = self._taps.layers[position]
        self.arrive(tap.layer.index, ctx)
        for number, batch in enumerate(self._batches):
            ctx.check()
            with self._taps.recording(logits=True, inputs=True, positions=[position]) as recording:
                if self.obstacle is not None:
                    self._model(mx.array(batch.tokens))
                else:
                    self._remember(self._travels[number], tap)
                (records,) = recording.drain()
            yield batch, records

    def _remember(self, travel: _Travel, tap: LayerTap) -> None:
        layer, call = self._layers[self._next], travel.calls[self._next]
        children = _children(layer)
        block = _block_child(layer, tap)
        travel.ahead = []
        # A block that is no child of the layer (gemma4's is the layer) leaves nothing to remember.
        ahead = block is not None

        def remember(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal ahead
            if children[number] is block:
                ahead = False
            out = own(*args, **kwargs)
            if ahead:
                travel.ahead.append((number, out))
            return out

        with intercepting(children, remember):
            layer(travel.hidden, *call.args, **call.kwargs)
        mx.eval([out for _, out in travel.ahead])


def _decoder_layers(model: nn.Module, taps: Taps) -> list[nn.Module]:
    """All decoder layers, MoE or not, in order."""
    modules = in_order(model)
    return [modules[layer.path] for layer in decoder_layers(modules, taps.anatomy)]


def _block_child(layer: nn.Module, tap: LayerTap) -> nn.Module | None:
    """The direct child of `layer` that is or holds the MoE block, None if the layer itself is."""
    parts = tap.layer.block.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    child = layer.get(parts[number + 1]) if parts[number + 1 :] else None
    return child if isinstance(child, nn.Module) else None


def _children(layer: nn.Module) -> list[nn.Module]:
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
