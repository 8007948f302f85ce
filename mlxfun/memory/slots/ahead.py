"""Reads experts of the next layer before its router has chosen, in a thread of its own.

Which experts a layer chooses depends on what the layer before it chose: how often each pair occurred
is counted while the model runs. What is likely and in no slot is read into buffers while the layer
before computes; arrays are made of them by the thread that owns the model, if they are wanted. Where
too few are, reading ahead rests for a while: the disk has other reads to serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.errors import ModelError
from mlxfun.memory.slots.bank import Buffers, LayerBank, read
from mlxfun.memory.slots.reader import FileReader

if TYPE_CHECKING:
    from mlxfun.arrays import Array

MOST_TOKENS = 4
"""A prompt chooses most experts of a layer, which says nothing: only decoding is learnt from."""

LIKELY = 0.5
"""An expert is read ahead if it followed the experts chosen now at least this often."""

TRIED, WORTH, REST = 64, 0.4, 2048
"""After so many experts read ahead, less than this share of them used lets reading ahead rest for so
many layers."""


class Followers:
    """How often experts of one layer followed those of the layer before. float32 [E, E'] each."""

    def __init__(self, before: int, experts: int) -> None:
        self._together: Array = np.zeros((before, experts), np.float32)
        self._seen: Array = np.zeros(before, np.float32)

    def learn(self, before: Array, chosen: Array) -> None:
        """A token chose `chosen` after `before`, expert numbers of one forward each."""
        self._together[np.ix_(before, chosen)] += 1
        self._seen[before] += 1

    def likely(self, before: Array) -> Array:
        """The share of times that each expert followed, float [E'], the mean over `before`."""
        seen = np.maximum(self._seen[before], 1)
        found: Array = (self._together[before] / seen[:, None]).mean(axis=0)
        return found


class ReadAhead:
    """Reads ahead for the layers of one model; asked and told by the thread that owns it.

    most: experts of a layer that are read ahead at a time.
    """

    def __init__(self, banks: Sequence[LayerBank], reader: FileReader, most: int) -> None:
        self._banks, self._reader, self._most = banks, reader, most
        self._followers = [Followers(a.experts, b.experts) for a, b in pairwise(banks)]
        self._pool = ThreadPoolExecutor(1, "mlxfun-ahead")
        self._waiting: dict[int, tuple[tuple[int, ...], Future[dict[int, Buffers]]]] = {}
        self._last: tuple[int, Array] | None = None
        self._tried = self._used = self._rest = 0
        self.unused = 0

    def chosen(self, position: int, experts: Array, tokens: int) -> None:
        """A layer has chosen its experts: learn from it, and read ahead for the next."""
        last, self._last = self._last, None
        if tokens > MOST_TOKENS:
            return
        if last is not None and last[0] == position - 1:
            self._followers[position - 1].learn(last[1], experts)
        self._last = (position, experts)
        if position + 1 < len(self._banks):
            self._read(position + 1, self._followers[position].likely(experts))

    def _read(self, position: int, likely: Array) -> None:
        if self._rest > 0:
            self._rest -= 1
            return
        bank = self._banks[position]
        # Not more than there is room for beside what the layer is sure to want.
        order = np.argsort(-likely, kind="stable")[: self._most]
        wanted = tuple(bank.absent(int(e) for e in order if likely[e] >= LIKELY))
        if wanted and position not in self._waiting:
            job = self._pool.submit(read, bank.source.stacks, wanted, self._reader)
            self._waiting[position] = (wanted, job)

    def ready(self, position: int, missing: Sequence[int]) -> dict[int, Buffers]:
        """What was read ahead of the experts that are missing; waits for it if it is on its way."""
        waiting = self._waiting.pop(position, None)
        if waiting is None:
            return {}
        experts, job = waiting
        useful = set(experts) & set(missing)
        if not useful and job.cancel():
            return {}  # nothing was read
        self._count(len(experts), len(useful))
        if not useful:
            return {}
        try:
            found = job.result()
        except ModelError:  # reading it again says why, where somebody waits for an answer
            return {}
        return {expert: found[expert] for expert in useful}

    def _count(self, tried: int, used: int) -> None:
        self._tried += tried
        self._used += used
        self.unused += tried - used
        if self._tried >= TRIED:
            if self._used < WORTH * self._tried:
                self._rest = REST
            self._tried = self._used = 0

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
