"""Keeps the host from queueing more than one layer ahead of the device, in forwards of many tokens.

What a layer computes is allocated when it is queued and freed when it has run. A host that runs
ahead holds what all layers compute: on a 30B model 11 GiB for 4,096 tokens. Waiting for the layer
before the one that was just queued costs next to nothing, because the device always has one to run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy.layers import decoder_layers, in_order, layer_paths
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


class Paced:
    """`with Paced(model, anatomy).forwards():` runs forwards layer by layer. Not for decoding, which
    it would stall. The layers are looked up once."""

    def __init__(self, model: nn.Module, anatomy: MoEMap) -> None:
        modules = in_order(model)
        self._hooks, self._pace = Hooks(modules), Pace()
        for layer in decoder_layers(modules, anatomy):
            self._hooks.on_call(layer.path, self._wait, required=False)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Forwards inside the block are paced."""
        with self._hooks:
            try:
                yield
            finally:
                self._pace.end()

    def _wait(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        self._pace(out)
        return out


@contextmanager
def layers_let_go(model: nn.Module) -> Iterator[None]:
    """Forwards inside the block evaluate layer by layer, and each layer then loses its parameters.

    For one forward of a lazily loaded model that must not be held whole: the device reads tensors
    on another queue than it computes on, so a forward that is evaluated at its end has read all
    of them long before it comes to the last layer. The model is unusable afterwards. Modules that
    several layers share keep their parameters.
    """
    modules = in_order(model)
    layers = {path: modules[path] for path in layer_paths(modules)}
    shared = Counter(
        part for layer in layers.values() for part in {id(module) for module in layer.modules()}
    )

    def let_go(layer: nn.Module) -> None:
        for part in layer.modules():
            if shared[id(part)] == 1:
                part.update({k: mx.zeros(0) for k, v in part.items() if isinstance(v, mx.array)})

    def passing(layer: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        let_go(layer)  # what is queued still holds the arrays, each until it is used
        mx.eval(out)
        return out

    hooks = Hooks(modules)
    for path, layer in layers.items():
        hooks.on_call(path, partial(passing, layer), required=False)
    with hooks:
        yield
