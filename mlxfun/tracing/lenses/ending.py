"""What a model does behind its last layer: from the residual stream to logits.

The model's own code does it: a forward is made in which the last layer hands on the hidden states
that are asked about, so final norm, head, scales and caps are the model's. Where norm and head alone
give the same bits, they are used, which spares a forward for each chunk.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.errors import HookError, ModelError
from mlxfun.hooks.head import HeadTap
from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.tracing.parts import Parts

WHOLE = 0.02
"""How far logits may be off, by the largest: 16-bit models round otherwise in other batches."""


class Ending:
    """See the module's text. Raises HookError for a model whose last layer is never called."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last = parts.map.layers[-1]
        family = module_name(parts.modules[self._last.path])
        self.streams = facts.STREAMS.get(family)
        self._direct: bool | None = None
        head = parts.map.head
        self._head = None if head is None else HeadTap(parts.model, head)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [n, V] of values of the residual stream behind a layer, lazy.

        hidden: [n, D], or [S, n, D] or [n, S, D] of a model with several streams (facts.STREAMS).
        """
        if self._direct is None:
            self._direct = self._is_direct(hidden)
        return self._norm_and_head(hidden) if self._direct else self._replayed(hidden)

    def require_whole(self, hidden: mx.array, logits: mx.array) -> None:
        """Raise ModelError unless the ending makes the model's own logits [n, V] of `hidden`, the
        stream behind its last layer: deepseek_v41's layers hand on more than their streams."""
        mine, own = (np.array(z.astype(mx.float32)) for z in (self.logits(hidden), logits))
        if np.abs(mine - own).max() > WHOLE * np.abs(own).max():
            raise ModelError(
                f"layers of {self._parts.map.model_type} hand on more than the residual stream, so "
                "that nothing can be read from it alone"
            )

    def _norm_and_head(self, hidden: mx.array) -> mx.array:
        norm: Any = self._parts.modules[self._parts.map.norm or ""]
        assert self._head is not None
        return self._head.logits(norm(hidden[None]))[0]

    def _is_direct(self, hidden: mx.array) -> bool:
        """Whether norm and head alone are all that the model does, judged on some of the rows."""
        if self.streams is not None or self._head is None or self._parts.map.norm is None:
            return False
        some = hidden[:4]
        alike = mx.array_equal(self._norm_and_head(some), self._replayed(some), equal_nan=True)
        return bool(np.array(alike))

    def _replayed(self, hidden: mx.array) -> mx.array:
        value = hidden[:, None] if self.streams == 0 else hidden[None]
        reached: list[bool] = []

        def instead(own: Any, *args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)  # of one token, and never evaluated
            reached.append(True)
            if isinstance(out, mx.array):
                return value
            place = next(i for i, part in enumerate(out) if isinstance(part, mx.array))
            return type(out)((*out[:place], value, *out[place + 1 :]))

        hooks = Hooks(self._parts.modules)
        hooks.on_call(self._last.path, instead, required=False)
        with hooks:
            logits: mx.array = self._parts.forward(mx.array([[0]]))[0]
        if not reached:
            raise HookError(
                f"the forward of {self._parts.map.model_type} does not call its last layer, so that "
                "nothing can be read from its residual stream"
            )
        return logits
