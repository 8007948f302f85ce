"""The routing of batches: which experts serve each request's tokens, and counting them.

A batch is run by mlx-lm's generator, so the forwards are seen from the model's side: the generator
is given a `RoutedModel`, which knows whose rows the next forward has.

What is counted stays on the device for some steps and is then copied to the host at once: a copy a
step would wait for the step in flight, and the device for the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from time import monotonic
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.arrays import Array
from mlxfun.calibration.collect import layer_sums
from mlxfun.errors import ModelError
from mlxfun.generation.decoder import Counter
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.hooks.step_routing import StepRouting
from mlxfun.serving.ask import Ask, TokenRouting

log = logging.getLogger(__name__)

STEPS = 32
"""Forwards whose routing waits on the device at most."""


class BatchCounter(Counter, Protocol):
    """Counts the routing of forwards over tokens of many requests."""

    def tokens(self, experts: Array, weights: Array, norms: Array | None) -> None:
        """Add N decoded tokens: experts int32 [L, N, K], -1 where unused; weights and norms of the
        experts' outputs, float32 [L, N, K], norms None where they are not measured."""


LOOK_SECONDS = 0.25
"""How often the routing of a step is looked at for the heatmap: the host waits for that step."""


class Watch:
    """The routing of a step now and then, while somebody looks. seen: by number of the request, the
    experts of its newest token that was looked at, int32 [L, K]."""

    def __init__(self) -> None:
        self.on = False
        self.seen: dict[int, Array] = {}
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether the next step is to be looked at."""
        return self.on and monotonic() >= self._next

    def saw(self, found: dict[int, Array]) -> None:
        """Keep what a step has shown."""
        self._next = monotonic() + LOOK_SECONDS
        self.seen = found


@dataclass(frozen=True, slots=True)
class Observer:
    """What lanes share. counter: what counts the traffic on the model that is live, None while
    nothing is counted. norms: whether the experts' outputs are measured for that. watch: what a
    heatmap lights up by."""

    taps: Taps
    concurrency: int
    counter: Callable[[], BatchCounter | None]
    norms: bool = True
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True, slots=True)
class Read:
    """A part of prompts that was read: sums [L, S, E] on the device."""

    sums: mx.array
    tokens: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The routing of a forward over one token of each of `rows` requests."""

    routing: StepRouting
    rows: int

    def on_host(self) -> tuple[Array, Array, Array | None]:
        """[L, rows, K] of each; see StepRouting.on_host."""
        experts, weights, norms = self.routing.on_host()
        shape = (len(experts), self.rows, -1)
        more = None if norms is None else norms.reshape(shape)
        return experts.reshape(shape), weights.reshape(shape), more


Seen = tuple[BatchCounter, Read | Rows]
"""What a forward has shown, and what counts it."""


class Uncounted:
    """What was seen of one lane's forwards and is not counted yet."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._problem: ModelError | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, counter: BatchCounter, seen: Read | Rows) -> None:
        """Keep what a forward has shown."""
        self._seen.append((counter, seen))

    def count(self, newest: bool = True) -> None:
        """Count what is kept, in the order of the forwards. newest: whether the last forward too,
        which may be in flight: that waits for it.

        Raises ModelError for NaN and infinity; whatever else is kept is counted all the same.
        """
        kept = self._seen if newest else self._seen[:-1]
        self._seen = [] if newest else self._seen[-1:]
        for counter, run in groupby(kept, key=lambda seen: seen[0]):
            try:
                _count(counter, [seen for _, seen in run])
            except ModelError as problem:
                self._problem = problem
        self.check()

    def check(self) -> None:
        """Raise what could not be raised when it was met."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def settle(self) -> None:
        """Count everything. What is wrong with it is raised by the next `count` or `check`, so that
        it fails the lane and not whoever reads the statistics."""
        try:
            self.count()
        except ModelError as problem:
            self._problem = problem
        except Exception:
            # A device that has failed: the forwards that were in flight show nothing.
            log.exception("the routing of the last steps was not counted")


def _count(counter: BatchCounter, run: Sequence[Read | Rows]) -> None:
    for read in run:
        if isinstance(read, Read):
            counter.prompt(np.array(read.sums), read.tokens)
    rows = [seen.on_host() for seen in run if isinstance(seen, Rows)]
    if rows:
        experts, weights = (np.concatenate([row[i] for row in rows], axis=1) for i in (0, 1))
        norms = [row[2] for row in rows if row[2] is not None]
        counter.tokens(experts, weights, np.concatenate(norms, axis=1) if norms else None)


class RoutedModel:
    """The model as the batch generator calls it. Between `begin` and `end` the first forward is the
    one that consumes a token of each request that is being answered.

    wrapped: the model itself. entering: whether the forward is looked at too in which answers that
    have begun elsewhere go on; see `entered`.
    """

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._model = self.wrapped = model
        self._observer = observer
        self._asks: Sequence[Ask] = ()
        self._numbers: Sequence[int] = ()
        self._first = self._looked = False
        self._seen: Rows | None = None
        self._counter: BatchCounter | None = None
        self._lengths: list[int] | None = None
        self._entered: Rows | None = None
        self.entering = False
        self.uncounted = Uncounted()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(
        self, asks: Sequence[Ask], numbers: Sequence[int], counter: BatchCounter | None
    ) -> None:
        """The generator is about to take a step in which these requests get a token, in order.

        Raises ModelError if the routing that is counted now has NaN or infinity.
        """
        self.uncounted.check()
        if len(self.uncounted) > STEPS:
            self.uncounted.count(newest=False)
        self._counter = counter
        self._asks, self._numbers, self._first, self._seen = asks, numbers, bool(asks), None
        self._looked = self._observer.watch.due

    def end(self) -> Callable[[int, int], TokenRouting | None] | None:
        """The step is over. (row, token) -> its routing, None where nobody asked for any."""
        seen, self._seen, self._first = self._seen, None, False
        asks = self._asks
        if seen is None or not (self._looked or any(ask.routing for ask in asks)):
            return None
        experts, weights, _ = seen.on_host()
        if self._looked:
            rows = enumerate(self._numbers)
            self._observer.watch.saw({n: experts[:, row].copy() for row, n in rows})

        def of(row: int, token: int) -> TokenRouting | None:
            if not asks[row].routing:
                return None
            return TokenRouting(token, experts[:, row].copy(), weights[:, row].copy())

        return of

    def entered(self, row: int, token: int) -> TokenRouting | None:
        """The routing of the last forward in which answers began."""
        entered, self._entered, self.entering = self._entered, None, False
        if entered is None:
            return None
        experts, weights, _ = entered.on_host()
        return TokenRouting(token, experts[:, row].copy(), weights[:, row].copy())

    def reading(self, lengths: list[int]) -> None:
        """The next forward reads so many tokens of each prompt, padded on the right."""
        self._lengths = lengths

    def __call__(self, tokens: mx.array, cache: Any = None, **more: Any) -> mx.array:
        first, self._first = self._first, False
        lengths, self._lengths = self._lengths, None
        if lengths is not None:
            return self._prompts(tokens, lengths, cache, more)
        enters = self.entering and not first
        wanted = enters or (first and (self._looked or any(ask.routing for ask in self._asks)))
        taps, counter = self._observer.taps, self._counter
        if not taps.layers or not (wanted or counter is not None):
            out: mx.array = self._model(tokens, cache=cache, **more)
            return out
        norms, rows = counter is not None and self._observer.norms, tokens.shape[0]
        with taps.stepping(norms=norms, rows=rows) as stepping:
            out = self._model(tokens, cache=cache, **more)
            routing = stepping.stacked()
        assert routing is not None
        mx.async_eval(routing.arrays())
        if counter is not None:
            self.uncounted.add(counter, Rows(routing, rows))
        if first:
            self._seen = Rows(routing, rows)
        elif enters:
            self._entered = Rows(routing, rows)
        return out

    def _prompts(
        self, tokens: mx.array, lengths: list[int], cache: Any, more: dict[str, Any]
    ) -> mx.array:
        """A part of prompts; what is padding is not counted."""
        counter, taps = self._counter, self._observer.taps
        if counter is None or not taps.layers:
            out: mx.array = self._model(tokens, cache=cache, **more)
            return out
        valid = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
        mask = mx.array(valid.reshape(-1).astype(np.float32))

        norms = self._observer.norms

        def reduce(tap: LayerTap, record: Record) -> mx.array:
            return layer_sums(tap.layer, [record], mask, measured=norms)

        with taps.reducing(reduce, norms=norms) as reduction:
            out = self._model(tokens, cache=cache, **more)
            sums = mx.stack(reduction.drain())
        mx.async_eval(sums)
        self.uncounted.add(counter, Read(sums, sum(lengths)))
        return out
