"""Keeps the host from queueing more than one layer ahead of the device, in forwards of many tokens.

What a layer computes is allocated when it is queued and freed when it has run. A host that runs
ahead holds what all layers compute: on a 30B model 11 GiB for 4,096 tokens. Waiting for the layer
before the one that was just queued costs next to nothing, because the device always has one to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy.layers import decoder_layers, in_order
from mlxfun.model.anatomy.types import MoEMap


class Pace:
    """Called with what a layer has queued, arrays in any structure."""

    def __init__(self) -> None:
        self._behind: Any = None

    def __call__(self, queued: Any) -> None:
        mx.async_eval(queued)
        if self._behind is not None:
            mx.eval(self._behind)
        self._behind = queued

    def end(self) -> None:
        """The forward is over: what was queued last need not be held any longer."""
        self._behind = None


@contextmanager
def paced(model: nn.Module, anatomy: MoEMap) -> Iterator[None]:
    """Forwards inside the block run layer by layer. Not for decoding, which it would stall."""
    modules = in_order(model)
    hooks, pace = Hooks(modules), Pace()

    def wait(own: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        pace(out)
        return out

    for layer in decoder_layers(modules, anatomy):
        hooks.on_call(layer.path, wait, required=False)
    with hooks:
        yield
