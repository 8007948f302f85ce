"""The experts of a whole model in slots: attached to it, seeded, counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlxfun.errors import HookError, UsageError
from mlxfun.events import HELD, READ
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.routing import LayerTap
from mlxfun.memory.reports import ResidencyReport
from mlxfun.memory.slots.ahead import ReadAhead
from mlxfun.memory.slots.bank import ABSENT, Buffers, LayerBank, StackOnDisk
from mlxfun.memory.slots.layer import Counts, SlotLayer
from mlxfun.memory.slots.partly import Partly
from mlxfun.memory.slots.reader import Traffic
from mlxfun.memory.slots.shares import divided
from mlxfun.model.device.memory import require
from mlxfun.model.parameters import ParameterTree

if TYPE_CHECKING:
    from mlxfun.arrays import Array


class ExpertSlots:
    """Slots for every MoE layer of a model whose stacks are placeholders.

    Made by the thread that owns the model, like every array in it.
    """

    def __init__(self, model: nn.Module, decided: Partly) -> None:
        """Make the slots, empty. Raises HookError if a layer's experts would run without them."""
        assert decided.reader is not None
        self.decided, self._reader = decided, decided.reader
        self._reader.traffic = Traffic()  # without what loading compared
        tree = ParameterTree(model)
        self.layers = tuple(
            SlotLayer(
                number,
                LayerBank(
                    source,
                    {path: tree.get(path).dtype for path in source.held},
                    decided.capacity,
                    self._reader,
                ),
                tree.modules,
                self,
            )
            for number, source in enumerate(decided.sources)
        )
        most = decided.options.read_ahead
        banks = [layer.bank for layer in self.layers]
        self._ahead = ReadAhead(banks, self._reader, most) if most else None
        self._hooks = Hooks(tree.modules)
        for layer, answers in zip(decided.layers, self.layers, strict=True):
            self._hooks.on_call(layer.experts, answers, required=False)
        self._hooks.attach()
        self._require_all(model)

    def _require_all(self, model: nn.Module) -> None:
        """Every stack of experts belongs to a layer that answers from slots: a swap that misses one
        would run it on placeholders."""
        swapped = [layer.experts for layer in self.decided.layers]
        stacks = [
            path
            for path, module in model.named_modules()
            if isinstance(module, SwitchGLU | SwitchMLP)
        ]
        if sorted(swapped) == sorted(stacks):
            return
        self._hooks.detach()
        odd = sorted(set(swapped) ^ set(stacks)) or swapped
        raise HookError(
            f"{len(stacks)} layers have experts and {len(swapped)} are answered from slots; "
            f"{odd[0]} is not: load the model whole, with --resident all, and report the "
            "architecture"
        )

    def leave_out(self, taps: Sequence[LayerTap]) -> None:
        """While decoding, leave out experts that are not in memory. taps: of the layers, which
        apply the weights. Raises UsageError for families whose weights are applied elsewhere."""
        for tap, layer in zip(taps, self.layers, strict=True):
            facts = tap.layer.facts
            if facts.weights_inside or facts.weights_from_router:
                raise UsageError(
                    f"--miss skip: {tap.layer.family} applies the experts' weights where none can "
                    "be taken away; leave the option out"
                )
            layer.leave_out = partial(setattr, tap, "present")

    def seed(self, scores: Array) -> None:
        """Begin with recorded use, float64 [L, E], and have the most used in slots; where a size and
        no number of slots was asked for, layers whose choices are spread wider get more of them."""
        if self.decided.options.capacity is None:
            self._divide(scores)
        for layer, row in zip(self.layers, scores, strict=True):
            layer.bank.usage.seed(row[: layer.bank.experts])
            ranked = layer.bank.usage.ranked(range(layer.bank.experts))
            layer.bank.hold(ranked[-layer.bank.capacity :])

    def _divide(self, scores: Array) -> None:
        banks = [layer.bank for layer in self.layers]
        used = [row[: bank.experts] for row, bank in zip(scores, banks, strict=True)]
        sizes = [bank.nbytes // bank.capacity for bank in banks]
        even = [min(self.decided.capacity, bank.experts) for bank in banks]
        least = max(layer.top_k for layer in self.decided.layers)
        self.resize_each(divided(used, sizes, even, least))

    def scores(self, experts: int) -> Array:
        """How much each expert was used of late, float64 [L, E]."""
        found = np.zeros((len(self.layers), experts))
        for row, layer in zip(found, self.layers, strict=True):
            row[: layer.bank.experts] = layer.bank.usage.scores
        return found

    def report(self) -> ResidencyReport:
        """What is held, and what was read so far."""
        counts = [layer.counts for layer in self.layers]
        traffic = self._reader.traffic
        return ResidencyReport(
            layers=len(self.layers),
            experts=max(layer.bank.experts for layer in self.layers),
            capacity=self.decided.capacity,
            slot_bytes=self.nbytes,
            kept_bytes=self.decided.kept_bytes,
            whole_bytes=self.decided.whole_bytes,
            tokens=max(one.tokens for one in counts),
            hits=sum(one.hits for one in counts),
            misses=sum(one.misses for one in counts),
            ahead=sum(one.ahead for one in counts),
            ahead_unused=0 if self._ahead is None else self._ahead.unused,
            skipped=sum(one.skipped for one in counts),
            evictions=sum(layer.bank.evictions for layer in self.layers),
            bytes_read=traffic.bytes,
            seconds=traffic.seconds,
            miss=self.decided.options.miss,
            slots=self.slots,
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in every layer."""
        return sum(layer.bank.nbytes // layer.bank.capacity for layer in self.layers)

    def resize(self, capacity: int) -> None:
        """Have `capacity` slots in every layer. Raises BudgetError if they do not fit."""
        more = (capacity - self.decided.capacity) * self.slot_bytes
        require(max(more, 0), f"{capacity} slots a layer", "try fewer")
        self.decided.capacity = capacity
        self.resize_each([capacity] * len(self.layers))

    @property
    def slots(self) -> tuple[int, ...]:
        """How many each layer has."""
        return tuple(layer.bank.capacity for layer in self.layers)

    def resize_each(self, counts: Sequence[int]) -> None:
        """Have so many slots in each layer. Those that lose some come first, so that no more is
        held at any time than before or after."""
        changes = zip(self.layers, counts, strict=True)
        for layer, count in sorted(changes, key=lambda one: one[1] - one[0].bank.capacity):
            if count != layer.bank.capacity:
                layer.bank.resize(count)
        mx.clear_cache()

    def forget_counts(self) -> None:
        """Count from now on."""
        self._reader.traffic = Traffic()
        for layer in self.layers:
            layer.counts, layer.bank.evictions = Counts(), 0
        if self._ahead is not None:
            self._ahead.unused = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.bank.nbytes for layer in self.layers)

    def resident(self, experts: int) -> Array:
        """bool [L, E], the experts that are in slots."""
        found = np.zeros((len(self.layers), experts), np.bool_)
        for row, layer in zip(found, self.layers, strict=True):
            row[: layer.bank.experts] = layer.bank.slot_of != ABSENT
        return found

    def frame(self, experts: int, fresh: bool = True) -> Array:
        """Where each expert is, int8 [L, E], see mlxfun.events.ON_DISK. fresh: tell those that were
        read since the last frame from the others."""
        found = self.resident(experts).astype(np.int8) * HELD
        for row, layer in zip(found, self.layers, strict=True):
            if fresh:
                row[[e for e in layer.fresh if row[e] == HELD]] = READ
                layer.fresh.clear()
        return found

    def keep_only(self, live: Sequence[Sequence[int]]) -> None:
        """Let all experts but `live`, [L][kept], leave their slots."""
        for layer, some in zip(self.layers, live, strict=True):
            layer.bank.drop(set(layer.bank.resident) - set(some))

    @property
    def aside(self) -> dict[str, StackOnDisk]:
        """The whole stacks by path of the parameter."""
        return {
            path: StackOnDisk(path, source, self._reader)
            for source in self.decided.sources
            for path in source.held
        }

    def close(self) -> None:
        """Give the layers their own classes back and close the files."""
        self._hooks.detach()
        if self._ahead is not None:
            self._ahead.close()
        self._reader.close()

    # -- told by the layers ---------------------------------------------------------------------

    def ready(self, position: int, missing: Sequence[int]) -> dict[int, Buffers]:
        """See Watcher."""
        return {} if self._ahead is None else self._ahead.ready(position, missing)

    def chosen(self, position: int, experts: Array, tokens: int) -> None:
        """See Watcher."""
        if self._ahead is not None:
            self._ahead.chosen(position, experts, tokens)
