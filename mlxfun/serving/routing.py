"""The routing of batches: which experts serve each request's tokens, and counting them.

A batch is run by mlx-lm's generator, so the forwards are seen from the model's side: the generator
is given a `RoutedModel`, which knows whose rows the next forward has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.calibration.collect import layer_sums
from mlxfun.generation.decoder import Counter
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.serving.ask import Ask, TokenRouting


@dataclass(frozen=True, slots=True)
class Observer:
    """What lanes share. counter: what counts the traffic on the model that is live, None while
    nothing is counted. norms: whether the experts' outputs are measured for that."""

    taps: Taps
    concurrency: int
    counter: Callable[[], Counter | None]
    norms: bool = True


@dataclass(frozen=True, slots=True)
class RowRouting:
    """The routing of a forward over one token of each row, on the device: experts int [L, B, K];
    weights and norms float32 [L, B, K], norms None where they are not measured."""

    experts: mx.array
    weights: mx.array
    norms: mx.array | None

    def queue(self) -> None:
        """Have it computed, without waiting."""
        mx.async_eval([a for a in (self.experts, self.weights, self.norms) if a is not None])

    def on_host(self) -> tuple[Any, Any, Any]:
        """Experts int32 [L, B, K], -1 where unused with weight 0; weights and norms float32, norms
        0 where they are not measured. Waits for the forward."""
        experts, weights = np.array(self.experts).astype(np.int32), np.array(self.weights)
        experts[weights == 0] = -1
        norms = np.zeros_like(weights) if self.norms is None else np.array(self.norms)
        return experts, weights, norms


class RoutedModel:
    """The model as the batch generator calls it. Between `begin` and `end` the first forward is the
    one that consumes a token of each request that is being answered."""

    def __init__(self, model: Any, observer: Observer) -> None:
        self._model, self._observer = model, observer
        self._asks: Sequence[Ask] = ()
        self._first = False
        self._seen: RowRouting | None = None
        self._counter: Counter | None = None
        self._uncounted: list[RowRouting] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(self, asks: Sequence[Ask]) -> None:
        """The generator is about to take a step in which these requests get a token, in order."""
        self.count()
        self._counter = self._observer.counter()
        self._asks, self._first, self._seen = asks, bool(asks), None

    def end(self) -> Callable[[int, int], TokenRouting | None] | None:
        """The step is over. (row, token) -> its routing, None where nobody asked for any."""
        seen, self._seen, self._first = self._seen, None, False
        asks = self._asks
        if seen is None or not any(ask.routing for ask in asks):
            return None
        experts, weights, _ = seen.on_host()

        def of(row: int, token: int) -> TokenRouting | None:
            if not asks[row].routing:
                return None
            return TokenRouting(token, experts[:, row].copy(), weights[:, row].copy())

        return of

    def count(self) -> None:
        """Count what was seen in the step before, which has been computed by now."""
        uncounted, self._uncounted = self._uncounted, []
        counter = self._counter
        if counter is None:
            return
        for seen in uncounted:
            experts, weights, norms = seen.on_host()
            for row in range(experts.shape[1]):
                counter.token(experts[:, row], weights[:, row], norms[:, row])

    def __call__(self, tokens: mx.array, cache: Any = None, **more: Any) -> mx.array:
        first, self._first = self._first, False
        if tokens.shape[1] > 1:
            return self._prompt(tokens, cache, more)
        wanted = first and any(ask.routing for ask in self._asks)
        taps = self._observer.taps
        if not taps.layers or not (wanted or self._counter is not None):
            out: mx.array = self._model(tokens, cache=cache, **more)
            return out
        norms = self._counter is not None and self._observer.norms
        with taps.recording(norms=norms) as recording:
            out = self._model(tokens, cache=cache, **more)
            records = [found[-1] for found in recording.drain()]
        seen = _stacked(records, tokens.shape[0], taps.anatomy.top_k)
        seen.queue()
        if first:
            self._seen = seen
        if self._counter is not None:
            self._uncounted.append(seen)
        return out

    def _prompt(self, tokens: mx.array, cache: Any, more: dict[str, Any]) -> mx.array:
        """A part of a prompt. While traffic is counted prompts are read one by one, without
        padding, so that every position counts."""
        counter, taps = self._counter, self._observer.taps
        if counter is None or not taps.layers:
            out: mx.array = self._model(tokens, cache=cache, **more)
            return out
        mask = mx.ones(tokens.size)

        def reduce(tap: LayerTap, record: Record) -> mx.array:
            if record.norms is None:
                record.norms = mx.zeros(record.indices.shape)
            return layer_sums(tap.layer, [record], mask)

        with taps.reducing(reduce, norms=self._observer.norms) as reduction:
            out = self._model(tokens, cache=cache, **more)
            sums = mx.stack(reduction.drain())
        counter.prompt(np.array(sums), tokens.size)
        return out


def _stacked(records: Sequence[Record], rows: int, width: int) -> RowRouting:
    experts, weights, norms = [], [], []
    for record in records:
        if record.weights is None:
            raise RuntimeError("the forward did not show its routing weights")
        experts.append(_padded(record.indices.reshape(rows, -1), width))
        weights.append(_padded(record.weights.reshape(rows, -1).astype(mx.float32), width))
        if record.norms is not None:
            norms.append(_padded(record.norms.reshape(rows, -1), width))
    return RowRouting(mx.stack(experts), mx.stack(weights), mx.stack(norms) if norms else None)


def _padded(array: mx.array, width: int) -> mx.array:
    missing = width - array.shape[1]
    return mx.pad(array, [(0, 0), (0, missing)]) if missing else array
