"""The routing of batches: which experts serve each request's tokens.

A batch is run by mlx-lm's generator, so the forwards are seen from the model's side: the generator
is given a `RoutedModel`, which knows whose rows the next forward has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.hooks.routing import Record, Taps
from mlxfun.serving.ask import Ask, TokenRouting


@dataclass(slots=True)
class Observer:
    """What lanes share: taps, and how many requests run at once."""

    taps: Taps
    concurrency: int


@dataclass(frozen=True, slots=True)
class RowRouting:
    """The routing of a forward over one token of each row, on the device: experts int [L, B, K],
    -1 never (see `on_host`), weights float32 [L, B, K]."""

    experts: mx.array
    weights: mx.array

    def on_host(self) -> tuple[Any, Any]:
        """Experts int32 [L, B, K], -1 where unused with weight 0, and weights float32 [L, B, K]."""
        experts, weights = np.array(self.experts).astype(np.int32), np.array(self.weights)
        experts[weights == 0] = -1
        return experts, weights


class RoutedModel:
    """The model as the batch generator calls it. Between `begin` and `end` the first forward is the
    one that consumes a token of each request that is being answered."""

    def __init__(self, model: Any, observer: Observer) -> None:
        self._model, self._observer = model, observer
        self._rows = 0  # of the forward to be recorded, 0 for none
        self._seen: RowRouting | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(self, asks: Sequence[Ask]) -> None:
        """The generator is about to take a step in which these requests get a token, in order."""
        self._seen = None
        wanted = any(ask.routing for ask in asks) and self._observer.taps.layers
        self._rows = len(asks) if wanted else 0
        self._asks = asks

    def end(self) -> Callable[[int, int], TokenRouting | None] | None:
        """The step is over. (row, token) -> its routing, None where nobody asked for any."""
        seen, self._seen, self._rows = self._seen, None, 0
        if seen is None:
            return None
        experts, weights = seen.on_host()
        asks = self._asks

        def of(row: int, token: int) -> TokenRouting | None:
            if not asks[row].routing:
                return None
            return TokenRouting(token, experts[:, row].copy(), weights[:, row].copy())

        return of

    def __call__(self, tokens: mx.array, cache: Any = None, **more: Any) -> mx.array:
        rows, self._rows = self._rows, 0
        if not rows:
            out: mx.array = self._model(tokens, cache=cache, **more)
            return out
        taps = self._observer.taps
        with taps.recording(norms=False) as recording:
            out = self._model(tokens, cache=cache, **more)
            records = [found[-1] for found in recording.drain()]
        self._seen = _stacked(records, rows, taps.anatomy.top_k)
        mx.async_eval(self._seen.experts, self._seen.weights)
        return out


def _stacked(records: Sequence[Record], rows: int, width: int) -> RowRouting:
    experts, weights = [], []
    for record in records:
        if record.weights is None:
            raise RuntimeError("the forward did not show its routing weights")
        experts.append(_padded(record.indices.reshape(rows, -1), width))
        weights.append(_padded(record.weights.reshape(rows, -1).astype(mx.float32), width))
    return RowRouting(mx.stack(experts), mx.stack(weights))


def _padded(array: mx.array, width: int) -> mx.array:
    missing = width - array.shape[1]
    return mx.pad(array, [(0, 0), (0, missing)]) if missing else array
