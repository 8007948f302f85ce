"""How much the loss minds an error in each module's weights, from one pass with a gradient.

With x_t what a module is given, y_t = W x_t, and g_t = d l / d y_t the gradient of l = -ln p(label),
summed over the text, where each label is drawn from the model's own distribution, the KL divergence
that an error D of W causes is to second order (the Fisher information, J. Martens, 2014), a token of T,

    KL = 1/(2T) E (sum_ij G_ij D_ij)^2  ~  1/(2T) E sum_ij G_ij^2 D_ij^2,    G = sum_t g_t x_t^T

since what rounding changes of one value says nothing of what it changes of another. G is that of a
batch, so correlations between tokens count, and is forgotten with it: what is kept is the sum for each
D. Of stacked experts each has a G of its own; of a token embedding G has the rows that were looked up.

The sums are the gradients of zeros that do not enter the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlxfun.data.datasets import Batch
from mlxfun.evaluation.after_head import no_gradient, repeatable_head
from mlxfun.evaluation.evaluator import LOGITS_BYTES
from mlxfun.evaluation.positions import predicting
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.recomputed import Recomputed, Values
from mlxfun.techniques.workspace import ResidentModel

INSTEAD = "quantise it with save --quantize BITS instead"

Use = Literal["linear", "experts", "lookup"]
"""How a weight is used: by a matrix product, by one for each expert, or by choosing rows."""


Errors = Callable[[str], Sequence[mx.array]]
"""The path of a module -> squared errors D^2 of its weight, float32, lazy or not."""


def use_of(module: nn.Module) -> Use | None:
    """How a module uses its weight, None for one that is not known here."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, SwitchLinear):
        return "experts"
    return "lookup" if isinstance(module, nn.Embedding) else None


class Fisher:
    """The sums of some modules of a model.

    Raises ModelError for a model whose logits are not made by a head from hidden states.
    """

    def __init__(self, workspace: ResidentModel, paths: Sequence[str], errors: Errors) -> None:
        """paths: of the modules; a tied embedding is used in both ways, named by "PATH as head".
        errors: as many for each module."""
        self._errors = errors
        anatomy = workspace.anatomy
        self._model = workspace.model
        self._modules = workspace.resident.tree.modules
        self._uses: dict[str, Use] = {}
        for path in paths:
            use = use_of(self._modules[path])
            if use is not None:
                self._uses[path] = use
        self._head, self._after = repeatable_head(
            workspace.model, anatomy, f"bits needs; {INSTEAD}"
        )
        self._at_head = self._head_key(anatomy.head)
        layers = {layer.path: [k for k in self._uses if k.startswith(f"{layer.path}.")]
                  for layer in workspace.map.layers}  # fmt: skip
        self._layers = Recomputed(layers, self._in_place)
        self._live: dict[str, mx.array] = {}
        self._chunk = max(64, LOGITS_BYTES // (4 * (anatomy.vocabulary or 1 << 15)))

    def _head_key(self, head: Any) -> str | None:
        """The name of the head's sums, None where the head is not among the modules."""
        if head.path not in self._uses:
            return None
        if not head.tied:
            return str(head.path)
        self._uses[as_head(head.path)] = "linear"
        return as_head(head.path)

    def sums(self, batch: Batch, key: mx.array) -> dict[str, mx.array]:
        """{module: sum_ij G_ij^2 D_ij^2 for each error, float32} of one batch without padding, lazy.

        key: of the random labels. Raises ModelError where MLX has no gradient."""
        zeros = {p: mx.zeros(len(self._errors(p.removesuffix(AS_HEAD)))) for p in self._uses}
        try:
            with self._hooks():
                found: dict[str, mx.array] = mx.grad(self._loss)(zeros, batch, key)
        except (ValueError, RuntimeError) as error:
            raise no_gradient(self._model, error, INSTEAD) from error
        return found

    def _loss(self, zeros: Values, batch: Batch, key: mx.array) -> mx.array:
        self._layers.now = zeros
        outside = [p for p in self._uses if not self._inside(p) and p != self._at_head]
        with self._in_place({p: zeros[p] for p in outside}), self._head.watching():
            self._model(mx.array(batch.tokens))
            seen = self._head.seen
        if seen is None:
            raise RuntimeError("the forward did not reach the output head")
        hidden, total = predicting(seen, batch), mx.array(0.0)
        given = {} if self._at_head is None else {self._at_head: zeros[self._at_head]}
        for number, start in enumerate(range(0, hidden.shape[0], self._chunk)):
            label = mx.random.split(key, number + 1)[number]
            loss: Callable[..., mx.array] = mx.checkpoint(partial(self._drawn, key=label))
            total = total + loss(given, hidden[start : start + self._chunk])
        return total

    def _inside(self, path: str) -> bool:
        return any(path in names for names in self._layers.layers.values())

    def _drawn(self, given: Values, hidden: mx.array, key: mx.array) -> mx.array:
        """-ln p of one label for each token, drawn from p."""
        with self._in_place(given):
            replayed = self._after == "changed"
            made = self._head.replayed(hidden) if replayed else self._head.logits(hidden)
        logits = made.astype(mx.float32)
        label = mx.random.categorical(mx.stop_gradient(logits), key=key)[:, None]
        chosen = mx.take_along_axis(logits, label, axis=-1)[:, 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - chosen)

    def _hooks(self) -> Hooks:
        hooks = Hooks(self._modules)
        self._layers.add_to(hooks)
        for name, use in self._uses.items():
            path = name.removesuffix(AS_HEAD)
            method = "as_linear" if path != name else "__call__"
            hooks.on_call(path, partial(self._seen, name, use), method=method, required=False)
        return hooks

    def _seen(self, name: str, use: Use, own: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        y = own(x, *args, **kwargs)
        zeros: Any = self._live.get(name)
        if zeros is None:
            return y
        errors = self._errors(name.removesuffix(AS_HEAD))
        if use == "experts":
            return _told_by_expert(x, y, args[0] if args else kwargs["indices"], zeros, errors)
        if use == "lookup":
            return _told_by_row(x, y, zeros, errors)
        return _told(x, y, zeros, errors)

    @contextmanager
    def _in_place(self, given: Values) -> Iterator[None]:
        before = dict(self._live)
        self._live.update(given)
        try:
            yield
        finally:
            self._live = before


AS_HEAD = " as head"


def as_head(path: str) -> str:
    """What the use of a tied embedding as the output head is called."""
    return path + AS_HEAD


Sums = Callable[[mx.array, mx.array], mx.array]
"""(x, g) -> G of one call."""


def _told(x: mx.array, y: mx.array, zeros: mx.array, errors: Sequence[mx.array]) -> mx.array:
    """y, with the sums as the gradient of the zeros. x: [..., in], y: [..., out]."""

    def product(x: mx.array, g: mx.array) -> mx.array:
        return _flat(g).T @ _flat(x)

    return _passing(product, x, y, zeros, errors)


def _told_by_row(
    rows: mx.array, y: mx.array, zeros: mx.array, errors: Sequence[mx.array]
) -> mx.array:
    """The same for rows that are looked up, int [...]."""

    def product(_: mx.array, g: mx.array) -> mx.array:
        return mx.zeros(errors[0].shape).at[rows.reshape(-1)].add(_flat(g))

    return _passing(product, mx.zeros(1), y, zeros, errors)


def _told_by_expert(
    x: mx.array, y: mx.array, indices: mx.array, zeros: mx.array, errors: Sequence[mx.array]
) -> mx.array:
    """The same for stacked experts. x: [..., 1, in], y: [..., 1, out], indices: [...]."""

    def product(x: mx.array, g: mx.array) -> mx.array:
        # Always sorted: MLX sums the products of an expert's tokens without making each of them.
        wide = mx.broadcast_to(x.squeeze(-2), (*indices.shape, x.shape[-1]))
        rows = indices.reshape(-1)
        order = mx.argsort(rows)

        def outputs(weight: mx.array) -> mx.array:
            return mx.gather_mm(
                _flat(wide)[order][:, None], weight, rhs_indices=rows[order], sorted_indices=True
            )

        weight = mx.zeros(errors[0].shape).swapaxes(-1, -2)
        _, (found,) = mx.vjp(outputs, [weight], [_flat(g)[order][:, None]])
        return found.swapaxes(-1, -2)

    return _passing(product, x, y, zeros, errors)


def _flat(values: mx.array) -> mx.array:
    return values.reshape(-1, values.shape[-1]).astype(mx.float32)


def _passing(
    product: Sums, x: mx.array, y: mx.array, zeros: mx.array, errors: Sequence[mx.array]
) -> mx.array:
    @mx.custom_function
    def passing(*arrays: mx.array) -> mx.array:
        return arrays[1]

    @passing.vjp
    def back(primals: Any, cotangent: mx.array, _: Any) -> Any:
        squared = mx.square(product(primals[0], cotangent))
        sums = [mx.sum(squared * error) for error in errors]
        return mx.zeros_like(primals[0]), cotangent, mx.stack(sums)

    out: Any = passing(x, y, zeros)
    found: mx.array = out
    return found
