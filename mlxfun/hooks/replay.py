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
from mlxfun.events import Notice
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.states import States
from mlxfun.model.anatomy.layers import decoder_layers, in_order
from mlxfun.model.anatomy.types import MoEMap
from mlxfun.model.places import LayerStore

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlxfun.arrays import Array
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
        along: bool = False,
    ) -> None:
        """Record the arguments of every layer.

        layers: all decoder layers. forwards: each runs the model once, on one batch. probe: int [T],
        one sequence to test with. along: of a model on disk that is done in the same reading; call
        `pass_probe` in every layer and `verify` at the end.
        """
        self.model: Any = model
        self.store = LayerStore.of(model)
        self.states = States(None if self.store is None else self.store.scratch)
        self.next = 0
        self.travels: list[Travel] = []
        self.layers = list(layers)
        self.obstacle: str | None = None
        self._probe: Probe | None = None
        self._length = 0
        try:
            self._require_known_faithful(probe, along)
            for number, forward in enumerate(forwards):
                ctx.check()
                hidden, calls = self.record(forward)
                self.states.put(number, hidden)
                self.travels.append(Travel(number, calls))
                ctx.progress("recording layer arguments", number + 1, len(forwards), "batches")
        except NotReplayable as reason:
            self.obstacle, self.travels = str(reason), []

    # -- recording ----------------------------------------------------------------------------

    def record(self, forward: Forward) -> tuple[mx.array, list[Call]]:
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

    def _require_known_faithful(self, probe: Tokens, along: bool) -> None:
        """Test it with a probe, once for a model that has to be read for it.

        along: the probe passes the layers together with the batches (see `verify`).
        """
        store = self.store
        if store is not None and store.verdict:
            raise NotReplayable(store.verdict)
        # Some layers do more on a longer text, a sparse attention beyond its window for instance.
        if store is not None and store.verdict is not None and len(probe) <= store.tested:
            return
        self._length = len(probe)
        try:
            self._probe = Probe(self, mx.array(probe)[None])
            captured = self.store is not None and self._probe.capture()
            if not (along and captured):
                self.test_ahead()
        except NotReplayable as reason:
            self._note_verdict(str(reason))
            raise

    def test_ahead(self) -> None:
        """Run the probe through all layers now, where it was to go along. Raises NotReplayable."""
        if self._probe is None:
            return
        for number in range(len(self.layers)):
            with self.reading(number):
                self._probe.pass_layer(number)
        if not self._probe.ran:
            self._probe.run_plain()
        self.verify()

    def verify(self) -> None:
        """Raise NotReplayable unless the probe, which has passed all layers, came out as it does of
        a plain forward."""
        if self._probe is None:
            return
        same, self._probe = self._probe.same, None
        if not same:
            reason = "its layers hand on more than hidden states"
            self._note_verdict(reason)
            raise NotReplayable(reason)
        self._note_verdict("")

    def end(self) -> None:
        """The pass is over, or was broken off."""
        self._probe = None
        if self.store is not None:
            self.store.forget_captured()

    def _note_verdict(self, verdict: str) -> None:
        if self.store is not None:
            self.store.verdict = verdict
            self.store.tested = max(self.store.tested, self._length)
            self.store.forget_captured()

    def pass_probe(self) -> None:
        """The probe, where one goes along, passes the next layer, which must be in memory."""
        if self._probe is None:
            return
        try:
            self._probe.pass_layer(self.next)
        except NotReplayable as reason:
            self._note_verdict(str(reason))
            raise

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
                self.pass_layer(ctx)
                self.next += 1

    def pass_layer(self, ctx: Context) -> None:
        """Run the next layer on all batches."""
        for travel in self.travels:
            ctx.check()
            self.advance(travel)

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


def longest(batches: Sequence[Array]) -> Array:
    """A row of the widest of batches of tokens [B, T], to test with."""
    row: Array = max(batches, key=lambda tokens: tokens.shape[1])[0]
    return row


def tell_reading(model: nn.Module, ctx: Context, times: int = 1) -> None:
    """Say what a pass reads from disk, where the model is there. times: at most."""
    store = LayerStore.of(model)
    if store is not None:
        often = "once" if times == 1 else f"up to {times} times"
        ctx.emit(Notice("info", f"the model is read from disk {often}: {store.cost(times)}"))


def all_layers(model: nn.Module, anatomy: MoEMap) -> list[nn.Module]:
    """Every decoder layer, MoE or not, in order."""
    modules = in_order(model)
    return [modules[layer.path] for layer in decoder_layers(modules, anatomy)]


class Probe:
    """One sequence, replayed layer by layer and run by a plain forward, to be compared bit for bit.

    Another sequence passes each layer behind it, as in a pass over batches: what a layer leaves in
    itself for a later one is that of the other then.
    """

    def __init__(self, replay: Replay, tokens: mx.array) -> None:
        """tokens: int [1, T]."""
        self._replay, self._tokens = replay, tokens
        run: Any = replay.model
        sequences = (tokens, tokens[:, ::-1][:, :OTHER_TOKENS])
        self._states = [replay.record(partial(run, one)) for one in sequences]
        self._plain: list[Any] = []

    def pass_layer(self, number: int) -> None:
        """Both sequences pass a layer, which must be in memory."""
        if len(self._plain) > number:
            mx.eval(self._plain[number])
        layer: Any = self._replay.layers[number]
        for place, (hidden, calls) in enumerate(self._states):
            call = calls[number]
            try:
                out = layer(hidden, *call.args, **call.kwargs)
            except STUB_ERRORS as error:
                raise NotReplayable(f"a layer needs what another one left ({error})") from error
            if not isinstance(out, mx.array):
                raise NotReplayable("its layers return more than hidden states")
            self._states[place] = out, calls
        mx.eval([hidden for hidden, _ in self._states])

    def run_plain(self) -> None:
        """The plain forward, at once."""
        run: Any = self._replay.model
        self._plain = []
        with intercepting(self._replay.layers, self._see):
            run(self._tokens)

    @property
    def ran(self) -> bool:
        """Whether there is a plain forward."""
        return bool(self._plain)

    def capture(self) -> bool:
        """Build the plain forward of a model on disk without reading it; each layer's part is read
        when that layer is. False for a model that reads its weights while it is built."""
        store = self._replay.store
        assert store is not None
        before, store.capturing = int(mx.get_active_memory()), True
        try:
            self.run_plain()
        finally:
            store.capturing = False
        if int(mx.get_active_memory()) - before <= store.largest // 4:
            return True
        self._plain = []
        store.forget_captured()
        return False

    def _see(self, _: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = own(*args, **kwargs)
        self._plain.append(out)
        return out

    @property
    def same(self) -> bool:
        """Whether both came out alike, once they passed the last layer."""
        if len(self._plain) != len(self._replay.layers):
            return False
        same = mx.array_equal(self._states[0][0], self._plain[-1], equal_nan=True)
        return bool(same.item())


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
        items = value if isinstance(value, list) else [value]
        found += [item for item in items if isinstance(item, nn.Module)]
    return list({id(module): module for module in found}.values())


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
