"""Layer-by-layer passes in which layers are observed, edited, and then run edited.

Editing a layer before moving on lets all later layers see the edited model, at the cost of one
pass over the layers (mlxfun.hooks.replay) instead of one forward per layer.

What a layer computes ahead of its MoE block (attention, norms) does not depend on the experts: it
is remembered while observing and given back when the edited layer runs.

Where layers cannot be replayed, each layer is observed by a forward of the whole model, of which
lazy evaluation computes only the part up to that layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

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
from mlxfun.model.device.hints import announce

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch


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
        self, position: int, ctx: Context = SILENT
    ) -> Iterator[tuple[Batch, Sequence[Record]]]:
        """The records of MoE layer `position` for each batch, with inputs, norms and logits, lazy.

        Evaluate what is needed of a batch's records before asking for the next batch.
        """
        tap = self._taps.layers[position]
        self.arrive(tap.layer.index, ctx)
        with self.reading(tap.layer.index):
            for number, batch in enumerate(self._batches):
                ctx.check()
                with self._taps.recording(
                    logits=True, inputs=True, positions=[position]
                ) as recording:
                    if self.obstacle is not None:
                        self.model(mx.array(batch.tokens))
                    else:
                        self._remember(self.travels[number], tap)
                    (records,) = recording.drain()
                yield batch, records

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


def _block_child(layer: nn.Module, tap: LayerTap) -> nn.Module | None:
    """The direct child of `layer` that is or holds the MoE block, None if the layer itself is."""
    parts = tap.layer.block.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    child = layer.get(parts[number + 1]) if parts[number + 1 :] else None
    return child if isinstance(child, nn.Module) else None
