"""Decoder layers that are in memory only while they run: a forward reads each of them in its turn.

Every forward of a model with a `LayerStore` runs in the memory of its largest layer, and reads the
model once. Forwards over many batches share a reading where they are carried layer by layer
(mlxfun.hooks.replay): the layer is then in memory already when it is called.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.replay import cache_states
from mlxfun.model.anatomy.layers import in_order
from mlxfun.model.places import LayerStore


class LayerReader:
    """Hooks every decoder layer of a model while attached."""

    def __init__(self, model: nn.Module, store: LayerStore) -> None:
        self._store = store
        self._hooks = Hooks(in_order(model))
        for path, number in store.numbers.items():
            self._hooks.on_call(path, self._reading(number), required=False)

    def attach(self) -> None:
        """Read layers from now on. Idempotent."""
        self._hooks.attach()

    def detach(self) -> None:
        """Leave the layers alone."""
        self._hooks.detach()

    def _reading(self, number: int) -> Any:
        store = self._store

        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            if store.in_use(number):
                return own(*args, **kwargs)
            if store.capturing:
                with store.captured(number):
                    return own(*args, **kwargs)
            with store.layer(number):
                out = own(*args, **kwargs)
                # What is lazy keeps the layer in memory.
                mx.eval(out, cache_states(*args, *kwargs.values()))
            return out

        return call
