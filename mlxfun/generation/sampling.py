"""Sampling tokens on the device, with random numbers that no other answer draws from."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

from mlxfun.generation.options import GenerateOptions


class Sampler:
    """Samples as mlx-lm's `make_sampler` does, from a random key of its own.

    The key is an array like any other, so that sampling can be queued without waiting for it.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._temperature, self._top_p = options.temperature, options.top_p
        self._key: Any = mx.random.key(options.seed)

    @property
    def key(self) -> Any:
        """Where the random numbers are; setting it goes back there."""
        return self._key

    @key.setter
    def key(self, key: Any) -> None:
        self._key = key

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, int32 [1], of logits [1, V]; lazy."""
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self._temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        if 0 < self._top_p < 1:
            logprobs = apply_top_p(logprobs, self._top_p)
        # As MLX's own generator does: the first half goes on, the second is drawn with.
        self._key, now = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1.0 / self._temperature), key=now)
