"""Layer-by-layer passes in which layers are observed, edited, and then run edited.

Editing a layer before moving on lets all later layers see the edited model, at the cost of one
pass over the layers (mlxfun.hooks.replay) instead of one forward per layer.

What a layer computes ahead of its MoE block (attention, norms) does not depend on the experts: it
is remembered while observing and given back when the edited layer runs.

Where layers cannot be replayed, each layer is observed by a forward of the whole model, of which
lazy evaluation computes only the part up to that layer.

A batch that turns out too large for the memory there is runs in halves from there on. Its records
are put together again, so whoever observes sees the batches that it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.hooks.replay import (
    Replay,
    Travel,
    all_layers,
    children,
    intercepting,
    longest,
    tell_reading,
)
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.model.anatomy.types import MoELayer
from mlxfun.model.device.batch_size import tell_halving
from mlxfun.model.device.hints import announce
from mlxfun.model.device.memory import is_out_of_memory

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

Result = TypeVar("Result")

OF_EXPERTS = ("indices", "weights", "norms", "logits", "inputs")
"""Fields of Record that a technique for experts needs."""
OF_ROUTER = ("logits", "router_inputs")
"""What a technique for routers needs, for which no expert has to run."""


@dataclass(slots=True)
class _Part:
    """Rows of a batch that run together. tokens: int [B, T], as wide as the batch; travel: None
    where layers are not replayed."""

    tokens: Array
    travel: Travel | None


class Carrier(Replay):
    """Calibration batches on their way through a model whose layers are edited as they pass.

        for position in range(L):
            for batch, records in carrier.observe(position): ...
            edit the layer; `arrive` runs it edited when the next one is observed

    The layer is in memory while it is observed; `at` keeps it there for what follows.
    """

    def __init__(
        self, model: nn.Module, taps: Taps, batches: Sequence[Batch], ctx: Context = SILENT
    ) -> None:
        """Record the arguments of every layer. Taps must be attached."""
        run: Any = model
        announce(ctx)
        tell_reading(model, ctx)
        self._batches = tuple(batches)
        forwards = [partial(run, mx.array(batch.tokens)) for batch in self._batches]
        probe = longest([batch.tokens for batch in self._batches])
        super().__init__(model, all_layers(model, taps.anatomy), forwards, probe, ctx)
        self._taps = taps
        travels: Sequence[Travel | None] = self.travels or [None] * len(self._batches)
        self._parts = [
            [_Part(batch.tokens, travel)]
            for batch, travel in zip(self._batches, travels, strict=True)
        ]
        self._numbers = len(self._batches)  # of travels so far

    @contextmanager
    def at(self, layer: MoELayer, ctx: Context = SILENT) -> Iterator[None]:
        """A layer is observed and edited inside the block; a model that is read layer by layer has
        it in memory until the batches have passed it as it stands at the end of the block.
        """
        if self.store is None:
            yield
            return
        self.arrive(layer.index, ctx)
        with self.store.layer(layer.index):
            yield
            if layer.index != self._taps.anatomy.indices[-1]:
                self.arrive(layer.index + 1, ctx)

    def observe(
        self, position: int, ctx: Context = SILENT, need: Sequence[str] = OF_EXPERTS
    ) -> Iterator[tuple[Batch, Sequence[Record]]]:
        """The records of MoE layer `position` for each batch, with inputs, norms and logits.

        need: the fields that come evaluated; what else a record holds is lazy. Raises BudgetError
        where not even one row of a batch fits in memory.
        """
        tap = self._taps.layers[position]
        self.arrive(tap.layer.index, ctx)
        with self.reading(tap.layer.index):
            for batch, parts in zip(self._batches, self._parts, strict=True):
                ctx.check()
                seen = self._each(parts, lambda part: self._seen(part, tap, need), ctx)
                yield batch, seen[0] if len(seen) == 1 else _joined(seen)

    def _seen(self, part: _Part, tap: LayerTap, need: Sequence[str]) -> Sequence[Record]:
        position = tap.layer.position
        with self._taps.recording(logits=True, inputs=True, positions=[position]) as recording:
            if self.obstacle is not None or part.travel is None:
                self.model(mx.array(part.tokens))
            else:
                self._remember(part.travel, tap)
            (records,) = recording.drain()
        mx.eval([getattr(record, name) for record in records for name in need])
        return records

    def pass_layer(self, ctx: Context) -> None:
        """See Replay."""
        for parts in self._parts:
            self._each(parts, self._advanced, ctx)

    def _advanced(self, part: _Part) -> None:
        assert part.travel is not None
        self.advance(part.travel)

    # -- where memory does not suffice ----------------------------------------------------------

    def _each(
        self, parts: list[_Part], work: Callable[[_Part], Result], ctx: Context
    ) -> list[Result]:
        """`work` on each part of a batch, which are halved where it runs out of memory."""
        found: list[Result] = []
        while len(found) < len(parts):
            ctx.check()
            part = parts[len(found)]
            try:
                found.append(work(part))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error)
            # Outside the handler, whose traceback keeps the arrays of the failed forward alive.
            mx.clear_cache()
            tell_halving(part.tokens, said, ctx)
            parts[len(found) : len(found) + 1] = self._halves(part)
        return found

    def _halves(self, part: _Part) -> list[_Part]:
        """A part as two, where the batch is now."""
        middle = (len(part.tokens) + 1) // 2
        rows = (slice(0, middle), slice(middle, None))
        if part.travel is None:
            return [_Part(part.tokens[some], None) for some in rows]
        hidden = self.states.pop(part.travel.number)
        made = []
        for some in rows:
            tokens = part.tokens[some]
            made.append(_Part(tokens, self._travel(tokens, hidden[some])))
        place = self.travels.index(part.travel)
        self.travels[place : place + 1] = [half.travel for half in made if half.travel is not None]
        return made

    def _travel(self, tokens: Array, hidden: mx.array) -> Travel:
        number, self._numbers = self._numbers, self._numbers + 1
        _, calls = self.record(partial(self.model, mx.array(tokens)))
        mx.eval(hidden)
        self.states.put(number, hidden)
        return Travel(number, calls)

    def _remember(self, travel: Travel, tap: LayerTap) -> None:
        layer, call = self.layers[self.next], travel.calls[self.next]
        parts = children(layer)
        block = _block_child(layer, tap)
        travel.ahead = []
        # A block that is no child of the layer (gemma4's is the layer) leaves nothing to remember.
        # Where hidden states went to files, there is no room for more of their size.
        ahead = block is not None and not self.states.spilled

        def remember(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal ahead
            if parts[number] is block:
                ahead = False
            out = own(*args, **kwargs)
            if ahead:
                travel.ahead.append((number, out))
            return out

        with intercepting(parts, remember):
            layer(self.states.get(travel.number), *call.args, **call.kwargs)
        mx.eval([out for _, out in travel.ahead])


def _joined(seen: Sequence[Sequence[Record]]) -> list[Record]:
    """Records of the parts of a batch as those of the whole, whose rows follow one another."""
    return [_whole(records) for records in zip(*seen, strict=True)]


def _whole(records: Sequence[Record]) -> Record:
    found = replace(records[0])
    for one in fields(Record):
        values = [getattr(record, one.name) for record in records]
        if values[0] is not None:
            setattr(found, one.name, mx.concatenate(values))
    return found


def _block_child(layer: nn.Module, tap: LayerTap) -> nn.Module | None:
    """The direct child of `layer` that is or holds the MoE block, None if the layer itself is."""
    parts = tap.layer.block.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    child = layer.get(parts[number + 1]) if parts[number + 1 :] else None
    return child if isinstance(child, nn.Module) else None
