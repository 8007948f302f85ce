"""Hook on the output head: records its inputs, and computes logits from recorded hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks, snapshot
from mlxfun.model.anatomy import Head

Logits = Callable[[mx.array], mx.array]
"""Hidden states [..., D] -> logits [..., V]."""


class HeadTap:
    """Sees the post-norm hidden states that enter the output head, tied or not.

    seen: [..., D], the head's input in the last forward inside `watching`, None before one.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._modules = dict(model.named_modules())
        self._head = head
        self.seen: mx.array | None = None

    def logits(self, hidden: mx.array) -> mx.array:
        """The live head alone, on hidden states [..., D] -> [..., V]."""
        return self._apply(self._modules[self._head.path], hidden)

    def frozen(self) -> Logits:
        """The head alone as it is now, whatever is edited afterwards: it keeps the arrays that the
        head (or tied embedding) holds, packed ones too, without copying them.
        """
        return partial(self._apply, snapshot(self._modules[self._head.path]))

    def _apply(self, module: Any, hidden: mx.array) -> mx.array:
        out: mx.array = module.as_linear(hidden) if self._head.tied else module(hidden)
        return out

    def replayed(self, hidden: mx.array, head: Logits | None = None) -> mx.array:
        """Logits [n, V] of hidden states [n, D] with what the model does to them after the head.

        A forward is made of one token in which the head sees `hidden` instead; what precedes the
        head is never evaluated. head: applied instead of the live one.
        """

        def instead(own: Any, _: mx.array) -> mx.array:
            out: mx.array = (head or own)(hidden[None])
            return out

        hooks = Hooks(self._modules)
        hooks.on_call(self._head.path, instead, method=self._method, required=False)
        with hooks:
            out: mx.array = self._modules[""](mx.array([[0]]))
        return out[0]

    @property
    def _method(self) -> str:
        return "as_linear" if self._head.tied else "__call__"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the head's input of every forward inside the block in `seen`."""
        hooks = Hooks(self._modules)
        # Not required: whether a forward reaches the head is what a caller may want to find out.
        hooks.on_call(self._head.path, self._watch, method=self._method, required=False)
        with hooks:
            try:
                yield
            finally:
                self.seen = None

    def _watch(self, own: Any, x: mx.array) -> mx.array:
        self.seen = x
        out: mx.array = own(x)
        return out
