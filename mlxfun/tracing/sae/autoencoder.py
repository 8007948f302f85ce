"""A sparse autoencoder of one value x [D]: features f [F], of which few are active at a token.

    z = (x - b_dec) W_enc + b_enc        x' = f W_dec + b_dec

    topk        f = ReLU(z) of the k largest z, 0 elsewhere. L. Gao et al., Scaling and evaluating
                sparse autoencoders, 2024
    jumprelu    f = z where z > threshold, 0 elsewhere. S. Rajamanoharan et al., Jumping ahead:
                improving reconstruction fidelity with JumpReLU sparse autoencoders, 2024

Rows of W_dec are the features' directions, of unit norm where this library has trained them, so a
feature's value is how far it moves x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlxfun.errors import UsageError
from mlxfun.tracing.options import SaeKind

CHUNK = 1 << 24
"""The most pre-activations that are there at once."""


def topk(z: mx.array, k: int) -> mx.array:
    """ReLU of the k largest entries of each row, 0 elsewhere; exactly k of them where at least k are
    positive, ties included. z: [..., F]."""
    if k >= z.shape[-1]:
        return mx.maximum(z, 0)
    best = mx.argpartition(-mx.stop_gradient(z), k - 1, axis=-1)[..., :k]
    mask = mx.put_along_axis(mx.zeros_like(z), best, mx.array(1.0, z.dtype), axis=-1)
    return mx.maximum(z, 0) * mask


def jumprelu(z: mx.array, threshold: mx.array) -> mx.array:
    """z where it is above its threshold [F] and positive, 0 elsewhere. z: [..., F]."""
    return mx.where(z > mx.maximum(threshold, 0), z, 0.0)


@dataclass(frozen=True, slots=True)
class Autoencoder:
    """W_enc: [D, F], b_enc: [F], W_dec: [F, D], b_dec: [D], all float32. k: of topk; threshold: [F],
    of jumprelu; exactly one of the two. at: name of the value. centred: whether b_dec is taken from
    x ahead of the encoder. skip: first tokens of each sample that it was not trained on.

    about: provenance, as text.
    """

    W_enc: mx.array
    b_enc: mx.array
    W_dec: mx.array
    b_dec: mx.array
    at: str
    k: int | None = None
    threshold: mx.array | None = None
    centred: bool = True
    skip: int = 0
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> SaeKind:
        """How features become sparse."""
        return "jumprelu" if self.k is None else "topk"

    @property
    def width(self) -> int:
        """D, values of x."""
        return int(self.W_dec.shape[1])

    @property
    def features(self) -> int:
        """F, how many features there are."""
        return int(self.W_dec.shape[0])

    def encode(self, x: mx.array) -> mx.array:
        """Features [..., F] of values [..., D], float32 whatever the dtype of x."""
        x = x.astype(mx.float32)
        z = (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc
        if self.k is not None:
            return topk(z, self.k)
        assert self.threshold is not None
        return jumprelu(z, self.threshold)

    def decode(self, features: mx.array) -> mx.array:
        """Values [..., D] of features [..., F], float32."""
        return features @ self.W_dec + self.b_dec

    def reconstruct(self, x: mx.array) -> mx.array:
        """x' [..., D] of values [..., D], in their dtype."""
        return self.decode(self.encode(x)).astype(x.dtype)

    def rows_at_once(self) -> int:
        """How many values may be encoded at once in bounded memory."""
        return max(1, CHUNK // self.features)

    def require_feature(self, feature: int) -> int:
        """`feature` itself. Raises UsageError where there is none of that number."""
        if not 0 <= feature < self.features:
            raise UsageError(
                f"there is no feature {feature}: the autoencoder has {self.features:,}, 0 to "
                f"{self.features - 1}"
            )
        return feature
