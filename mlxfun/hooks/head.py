"""Hook on the output head: records its inputs, and computes logits from recorded hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.model.anatomy import Head


class HeadTap:
    """Sees the post-norm hidden states that enter the output head, tied or not."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._module: nn.Module = dict(model.named_modules())[head.path]
        self._tied = head.tied
        self.seen: mx.array | None = None

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone, on hidden states [..., D]."""
        call: Any = self._module
        out: mx.array = call.as_linear(hidden) if self._tied else call(hidden)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the head's input of every forward inside the block in `seen`."""
        tap, original = self, type(self._module)

        def watched(module: Any, x: mx.array) -> mx.array:
            tap.seen = x
            result: mx.array = getattr(super(swapped, module), name)(x)
            return result

        name = "as_linear" if self._tied else "__call__"
        swapped = type(original.__name__, (original,), {name: watched})
        self._module.__class__ = swapped
        try:
            yield
        finally:
            self._module.__class__ = original
            self.seen = None
