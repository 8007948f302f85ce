"""Decoder layers that are computed again when their gradient is taken.

Of a forward only the inputs of the layers are kept then. MLX takes no gradient of what a checkpointed
function encloses, so what a layer depends on is handed to it as an argument and put in its place
inside, both times it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx

from mlxfun.hooks.intercept import Hooks

Values = Mapping[str, Any]
"""{name: a variable of the gradient, or a tree of them}."""

Place = Callable[[Values], AbstractContextManager[None]]
"""Puts variables where the model finds them, inside a block."""


class Recomputed:
    """layers: see `__init__`. now: all variables, to be set ahead of each forward."""

    def __init__(self, layers: Mapping[str, Sequence[str]], place: Place) -> None:
        """layers: {path of a decoder layer: names of the variables inside it}."""
        self.layers, self._place = layers, place
        self.now: Values = {}

    def add_to(self, hooks: Hooks) -> None:
        """Hook every layer. The hooks have to be attached while the gradient is taken as well."""
        for path, inside in self.layers.items():
            hooks.on_call(path, partial(self._through, inside), required=False)

    def _through(self, inside: Sequence[str], own: Any, *args: Any, **kwargs: Any) -> Any:
        def run(given: Values, *args: Any, **kwargs: Any) -> Any:
            with self._place(given):
                return own(*args, **kwargs)

        return mx.checkpoint(run)({name: self.now[name] for name in inside}, *args, **kwargs)
