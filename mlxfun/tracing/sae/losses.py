"""What a sparse autoencoder is trained by; x is scaled so that E||x - b_dec||^2 = 1.

    topk        L = ||x - x'||^2 + a L_aux
    jumprelu    L = ||x - x'||^2 + l (L0 / k - 1)^2 + a L_aux, L0 the mean number of active features
                of the batch
    L_aux       ||e - e'||^2, where e = x - x' is held fixed and e' is decoded of the D / 2 largest
                pre-activations among features that are dead: they learn what is left over

topk and L_aux are those of Gao et al. 2024; jumprelu and its loss, with a target for L0, those of
Rajamanoharan et al. 2024, whose features have no L_aux. The step has no useful gradient, so that
paper's straight-through estimator takes its place, with the kernel K of width w (`bandwidth`):

    d f / d threshold = -(threshold / w) K((z - threshold) / w)      K(u) = 1 for |u| < 1/2, else 0
    d H(z - threshold) / d threshold = -(1 / w) K((z - threshold) / w)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import mlx.core as mx

from mlxfun.tracing.options import SaeKind
from mlxfun.tracing.sae.autoencoder import topk

Params = dict[str, mx.array]
"""W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], and threshold [F] of jumprelu."""
Function = Callable[[mx.array, mx.array], mx.array]


def _kernel(z: mx.array, threshold: mx.array, width: float) -> mx.array:
    return (mx.abs(z - threshold) < width / 2).astype(z.dtype) / width


@cache
def jump(width: float) -> Function:
    """(z [N, F], threshold [F]) -> features [N, F], with the estimator of this bandwidth."""

    @mx.custom_function
    def forward(z: mx.array, threshold: mx.array) -> mx.array:
        return mx.where(z > threshold, z, 0.0)

    def backward(given: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        z, threshold = given
        slope = -threshold * _kernel(z, threshold, width) * cotangent
        return cotangent * (z > threshold), slope.sum(0)

    forward.vjp(backward)
    return cast(Function, forward)


@cache
def step(width: float) -> Function:
    """(z [N, F], threshold [F]) -> 1 where z is above, with the estimator of this bandwidth."""

    @mx.custom_function
    def forward(z: mx.array, threshold: mx.array) -> mx.array:
        return (z > threshold).astype(z.dtype)

    def backward(given: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        z, threshold = given
        return mx.zeros_like(z), (-_kernel(z, threshold, width) * cotangent).sum(0)

    forward.vjp(backward)
    return cast(Function, forward)


class Loss:
    """The loss of one kind. k: active features, of jumprelu the target for their mean number.
    sparsity: l; auxiliary: a; bandwidth: w."""

    def __init__(
        self, kind: SaeKind, k: int, sparsity: float, auxiliary: float, bandwidth: float
    ) -> None:
        self.kind, self.k = kind, k
        self.sparsity, self.auxiliary, self.bandwidth = sparsity, auxiliary, bandwidth

    def __call__(
        self, params: Params, x: mx.array, dead: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(L, mean ||x - x'||^2, which features were active: bool [F]). x: float32 [N, D]; dead:
        bool [F], None where none are."""
        z = (x - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
        if self.kind == "topk":
            features, penalty = topk(z, self.k), mx.array(0.0)
        else:
            threshold = mx.maximum(params["threshold"], 0)
            features = jump(self.bandwidth)(z, threshold)
            l0 = step(self.bandwidth)(z, threshold).sum(-1).mean()
            penalty = self.sparsity * (l0 / self.k - 1) ** 2
        error = x - (features @ params["W_dec"] + params["b_dec"])
        squared = mx.square(error).sum(-1).mean()
        loss = squared + penalty
        if dead is not None:
            loss = loss + self.auxiliary * self._left_over(params, z, error, dead)
        return loss, squared, (features > 0).any(0)

    def _left_over(self, params: Params, z: mx.array, error: mx.array, dead: mx.array) -> mx.array:
        width, count = params["W_enc"].shape
        most = max(1, min(width // 2, count))
        revived = topk(mx.where(dead, z, -mx.inf), most)
        left = mx.stop_gradient(error) - revived @ params["W_dec"]
        return mx.square(left).sum(-1).mean()
