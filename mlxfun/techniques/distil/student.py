"""The live model as a function of what is trained, and its loss.

    loss = mean over tokens of KL(checkpoint || model), in nats

Gradients reach the routers through the weights of the experts that were chosen (the choice itself
has no gradient), and earlier layers through packed weights, which MLX differentiates in their input.

What is held of a step's forward is the input of each decoder layer: a layer is computed again when
its gradient is taken. Logits are made and forgotten in chunks of tokens, the checkpoint's by its own
head from its hidden states ahead of that, which are cached (mlxfun.evaluation.evaluator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlxfun.data.datasets import Batch
from mlxfun.evaluation.after_head import no_gradient, repeatable_head
from mlxfun.evaluation.evaluator import LOGITS_BYTES, Reference
from mlxfun.evaluation.positions import predicting
from mlxfun.hooks.head import Logits
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.recomputed import Recomputed
from mlxfun.model.distributions import log_softmax
from mlxfun.techniques.distil.variables import Masters, Variable
from mlxfun.techniques.workspace import ResidentModel

LEAST_CHUNK = 64
"""Tokens whose logits are made at once, at least."""


class Student:
    """The live weights of a workspace with some of their parameters in training.

    Raises ModelError for a model whose logits are not made by a head from hidden states.
    """

    def __init__(self, workspace: ResidentModel, wanted: Sequence[Variable]) -> None:
        anatomy = workspace.anatomy
        self._model = workspace.model
        self._tree = workspace.resident.tree
        self._wanted = {v.path: v for v in wanted}
        inside = {
            layer.path: [v.path for v in wanted if v.layer == layer.index]
            for layer in workspace.map.layers
        }
        self._layers = Recomputed(inside, self._in_place)
        self._packed: Masters = {}
        self._head, self._after = repeatable_head(
            workspace.model, anatomy, "distil needs; prune, narrow or merge with a refit instead"
        )
        self.chunk = max(LEAST_CHUNK, LOGITS_BYTES // (4 * (anatomy.vocabulary or 1 << 15)))

    def gradient(
        self, masters: Masters, batch: Batch, teacher: Reference
    ) -> tuple[mx.array, Masters]:
        """The loss of a batch and its gradient, lazy. Raises ModelError where MLX has none."""
        states, head = self._cached(teacher, batch)
        try:
            # Layers are computed again inside of this: a packed router must be a matrix then as well.
            with self._hooks():
                found: tuple[mx.array, Masters] = mx.value_and_grad(self._loss)(
                    masters, batch, states, head
                )
        except (ValueError, RuntimeError) as error:
            instead = "use distil --local, which needs none"
            raise no_gradient(self._model, error, instead) from error
        return found

    def _cached(self, teacher: Reference, batch: Batch) -> tuple[mx.array, Logits]:
        """What entered the checkpoint's head at the batch's predicting positions [n, D]; the head."""
        assert teacher.hidden is not None
        assert teacher.head is not None
        return mx.concatenate([teacher.hidden[row] for row in batch.rows]), teacher.head

    def _loss(self, masters: Masters, batch: Batch, teacher: mx.array, head: Logits) -> mx.array:
        hidden = predicting(self._hidden(masters, mx.array(batch.tokens)), batch)
        total = mx.array(0.0)
        # Recomputed for its gradient: the logits of all chunks would not fit.
        divergence: Callable[[mx.array, mx.array], mx.array] = mx.checkpoint(
            partial(self._divergence, head=head)
        )
        for start in range(0, hidden.shape[0], self.chunk):
            part = slice(start, start + self.chunk)
            total = total + divergence(hidden[part], teacher[part].astype(hidden.dtype))
        return total / hidden.shape[0]

    def _divergence(self, hidden: mx.array, teacher: mx.array, head: Logits) -> mx.array:
        """Summed KL of a chunk, hidden states [n, D] of both."""
        log_p = log_softmax(self._logits(teacher, head))
        log_q = log_softmax(self._logits(hidden, None))
        return mx.sum(mx.exp(log_p) * (log_p - log_q))

    def _logits(self, hidden: mx.array, head: Logits | None) -> mx.array:
        if self._after == "changed":
            return self._head.replayed(hidden, head)
        return (head or self._head.logits)(hidden)

    def _hidden(self, masters: Masters, tokens: mx.array) -> mx.array:
        """What enters the head [B, T, D], lazy, as a function of the masters."""
        self._layers.now = masters
        outside = {p: masters[p] for p, v in self._wanted.items() if v.layer is None}
        with self._in_place(outside), self._head.watching():
            self._model(tokens)
            seen = self._head.seen
        if seen is None:
            raise RuntimeError("the forward did not reach the output head")
        return seen

    def _hooks(self) -> Hooks:
        """Every decoder layer is computed again for its gradient; packed routers are matrices."""
        hooks = Hooks(self._tree.modules)
        self._layers.add_to(hooks)
        for path, variable in self._wanted.items():
            if variable.packed:
                hooks.on_call(variable.module, partial(self._unpacked, path), required=False)
        return hooks

    def _unpacked(self, path: str, own: Any, x: mx.array) -> mx.array:
        master = self._packed.get(path)
        if master is None:
            out: mx.array = own(x)
            return out
        out = x @ master.T.astype(x.dtype)
        bias = self._tree.modules[self._wanted[path].module].get("bias")
        return out if bias is None else out + bias

    @contextmanager
    def _in_place(self, given: Mapping[str, mx.array]) -> Iterator[None]:
        """The masters in the model, in the dtype that it computes in."""
        held = {}
        try:
            for path, master in given.items():
                if self._wanted[path].packed:
                    self._packed[path] = master
                else:
                    held[path] = self._tree.get(path)
                    self._tree.put(path, master.astype(held[path].dtype))
            yield
        finally:
            for path, array in held.items():
                self._tree.put(path, array)
            for path in given:
                self._packed.pop(path, None)
