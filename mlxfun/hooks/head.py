"""Hook on the output head: records its inputs, and computes logits from recorded hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy import Head


class HeadTap:
    """Sees the post-norm hidden states that enter the output head, tied or not.

    seen: [..., D], the head's input in the last forward inside `watching`, None before one.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._modules = dict(model.named_modules())
        self._head = head
        self.seen: mx.array | None = None

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone, on hidden states [..., D] -> [..., V]."""
        call: Any = self._modules[self._head.path]
        out: mx.array = call.as_linear(hidden) if self._head.tied else call(hidden)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the head's input of every forward inside the block in `seen`."""
        hooks = Hooks(self._modules)
        method = "as_linear" if self._head.tied else "__call__"
        # Not required: whether a forward reaches the head is what a caller may want to find out.
        hooks.on_call(self._head.path, self._watch, method=method, required=False)
        with hooks:
            try:
                yield
            finally:
                self.seen = None

    def _watch(self, own: Any, x: mx.array) -> mx.array:
        self.seen = x
        out: mx.array = own(x)
        return out
