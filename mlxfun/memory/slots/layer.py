"""The call of one layer's experts, with some of them in slots.

The experts that the router has chosen are looked at on the host, which evaluates the model up to
here: the one evaluation inside a forward that the design allows. Those that are in no slot are read,
and the layer's own code runs on the slots, with the numbers of experts replaced by those of slots.

Each token's output for one expert depends on that token and that expert alone, so where more experts
are chosen than there are slots they are taken in groups, each expert once, and the outputs are put
where they belong. Weighting and summing them is the model's, after that, in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import running
from mlxfun.memory.slots.bank import ABSENT, Buffers, LayerBank
from mlxfun.memory.slots.kernels import pieces, same_kernel

if TYPE_CHECKING:
    from mlxfun.arrays import Array


@dataclass(slots=True)
class Counts:
    """Experts that were in a slot when they were wanted, those that were not, and those of the
    latter that had been read ahead; choices that were left out; tokens that passed."""

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    skipped: int = 0
    tokens: int = 0


class Watcher(Protocol):
    """Who is told of a layer's choices, and may have read experts before they are wanted."""

    def ready(self, position: int, missing: Sequence[int]) -> dict[int, Buffers]:
        """What was read ahead of the layer's missing experts, taken out."""

    def chosen(self, position: int, experts: Array, tokens: int) -> None:
        """The layer has chosen `experts` for so many tokens: the next may be read ahead."""


Present = Callable[[mx.array], None]
"""Told which choices of a forward, bool [..., K], are in memory: the others are to be left out."""


class SlotLayer:
    """Answers the calls of one layer's experts.

    leave_out: given where experts that are not in memory are left out while decoding.

    modules: path -> module, of the projections whose arrays the bank holds. packed: whether they
    are quantised, which decides the kernel. position: of the MoE layer.
    """

    def __init__(
        self, position: int, bank: LayerBank, modules: dict[str, nn.Module], watcher: Watcher
    ) -> None:
        self.position, self.bank, self.counts = position, bank, Counts()
        self.leave_out: Present | None = None
        self.fresh: set[int] = set()  # read since somebody looked
        self._watcher = watcher
        self._places = [
            (modules[path.rpartition(".")[0]], path.rpartition(".")[2], path)
            for path in bank.source.held
        ]
        self._packed = any(name == "scales" for _, name, _ in self._places)

    def __call__(
        self, own: Callable[..., mx.array], x: mx.array, indices: mx.array, *more: Any, **named: Any
    ) -> mx.array:
        """What the layer's own code makes of `x` [..., D] for `indices` [..., K]: [..., K, D]."""
        chosen = np.array(indices)
        bank, wanted = self.bank, self._note(chosen)
        call = _Call(own, more, named)
        if self.leave_out is not None and _decoding(x):
            return self._with_what_is_there(call, x, chosen, self.leave_out)
        if len(wanted) <= bank.capacity and same_kernel(
            chosen.size, bank.experts, bank.capacity, self._packed
        ):
            self._hold(wanted)
            return self._run(call, x, bank.slot_of[chosen])
        return self._in_groups(call, x, chosen, wanted)

    def _note(self, chosen: Array) -> list[int]:
        """The experts of `chosen`, counted."""
        counts = np.bincount(chosen.reshape(-1), minlength=self.bank.experts)
        wanted: list[int] = np.flatnonzero(counts).tolist()
        tokens = chosen.size // chosen.shape[-1]
        missing = len(self.bank.absent(wanted))
        self.counts.hits += len(wanted) - missing
        self.counts.misses += missing
        self.counts.tokens += tokens
        self.bank.usage.note(counts, tokens)
        self._watcher.chosen(self.position, np.array(wanted), tokens)
        return wanted

    def _hold(self, experts: list[int]) -> None:
        missing = self.bank.absent(experts)
        if missing:
            running().check()  # a prompt may read the whole model
        ready = self._watcher.ready(self.position, missing)
        read = self.bank.hold(experts, ready)
        self.fresh.update(read)
        self.counts.ahead += sum(1 for expert in read if expert in ready)

    def _with_what_is_there(
        self, call: _Call, x: mx.array, chosen: Array, leave_out: Present
    ) -> mx.array:
        """The output of the experts that are in slots; a token of which none is gets all read."""
        bank = self.bank
        there = bank.slot_of[chosen] != ABSENT
        none = ~there.any(axis=-1)
        if none.any():
            wanted = np.unique(np.concatenate([chosen[none].reshape(-1), chosen[there]]))
            if len(wanted) > bank.capacity:
                wanted = np.unique(chosen[none])
            if len(wanted) <= bank.capacity:
                self._hold(wanted.tolist())
                there = bank.slot_of[chosen] != ABSENT
        self.counts.skipped += int((~there).sum())
        leave_out(mx.array(there))
        # The row of another expert stands for one that is left out: its weight becomes 0.
        return self._run(call, x, np.where(there, bank.slot_of[chosen], 0))

    def _run(self, call: _Call, x: mx.array, slots: Array) -> mx.array:
        with self._in_place():
            return call(x, mx.array(slots.astype(np.uint32)))

    def _in_groups(self, call: _Call, x: mx.array, chosen: Array, wanted: list[int]) -> mx.array:
        """The same for more experts than slots: rows of x, one for each token and expert."""
        rows = x.reshape(-1, x.shape[-1])
        flat = chosen.reshape(-1)
        order, outputs = [], []
        for group in self._groups(wanted):
            self._hold(group)
            where = np.flatnonzero(np.isin(flat, group))
            # Sorted by expert, as stock code sorts them.
            where = where[np.argsort(flat[where], kind="stable")]
            for part, filled in pieces(
                where, chosen.size, self.bank.experts, self.bank.capacity, self._packed
            ):
                tokens = mx.array((filled // chosen.shape[-1]).astype(np.uint32))
                slots = self.bank.slot_of[flat[filled]][:, None]
                y = self._run(call, rows[tokens], slots)[: len(part), 0]
                order.append(part)
                outputs.append(y)
            # The slots are written to next, which is only done in place if nothing waits for them.
            mx.eval(outputs)
        back = np.empty(flat.size, np.uint32)
        back[np.concatenate(order)] = np.arange(flat.size, dtype=np.uint32)
        y = mx.concatenate(outputs)[mx.array(back)]
        return y.reshape(*chosen.shape, y.shape[-1])

    def _groups(self, wanted: list[int]) -> Iterator[list[int]]:
        """`wanted` in groups that fit: what is in slots first, so that each is read once at most,
        then the rest, the most used last, since they are what stays."""
        bank = self.bank
        held = [e for e in wanted if bank.slot_of[e] != ABSENT]
        rest = bank.usage.ranked(bank.absent(wanted))
        first = bank.capacity - len(held)
        # What leaves its slot for the first group must not be one of the group's own.
        yield [*held, *rest[:first]]
        for start in range(first, len(rest), bank.capacity):
            yield rest[start : start + bank.capacity]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The slots in the place of the stacks inside the block."""
        before = [module[name] for module, name, _ in self._places]
        for module, name, path in self._places:
            module[name] = self.bank.arrays[path]
        try:
            yield
        finally:
            for (module, name, _), array in zip(self._places, before, strict=True):
                module[name] = array


def _decoding(x: mx.array) -> bool:
    """Whether x, [B, T, D] or [T, D], is one token of each text: a prompt is always read whole."""
    return x.ndim > 1 and x.shape[-2] == 1


@dataclass(frozen=True, slots=True)
class _Call:
    """The layer's own code, with what it is given besides."""

    own: Callable[..., mx.array]
    more: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self.own(x, indices, *self.more, **self.named)
