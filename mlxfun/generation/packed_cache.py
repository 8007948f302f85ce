"""Quantised KV caches: of one answer as mlx-lm makes them, and of a batch, which mlx-lm has none of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    dynamic_roll,
    make_prompt_cache,
)

from mlxfun.checkpoint.options import PackedCache
from mlxfun.errors import ModelError
from mlxfun.model.places import LayerStore
from mlxfun.text import brief

Packed = tuple[mx.array, mx.array, mx.array]
"""What mx.quantize makes of [B, H, T, D]: values, scales, biases."""


class PackedKVCache(QuantizedKVCache):
    """mlx-lm's cache of one answer, which can become a row of a batch."""

    keys: Any  # Packed, None before the first token
    values: Any

    @classmethod
    def merge(cls, caches: Sequence[PackedKVCache]) -> BatchPackedKVCache:
        """A batch of caches, shorter ones padded on the left."""
        longest = max(cache.offset for cache in caches)
        padding = [longest - cache.offset for cache in caches]
        found = BatchPackedKVCache(padding, caches[0].group_size, caches[0].bits)
        if longest == 0:
            return found
        some = next(cache for cache in caches if cache.keys is not None)

        def row(cache: PackedKVCache, name: str, pad: int) -> Packed:
            held = getattr(cache, name)
            if held is None:
                blank = getattr(some, name)
                return _each(
                    lambda a: mx.zeros((1, a.shape[1], longest, a.shape[3]), a.dtype), blank
                )
            return _each(lambda a: _left(a[..., : cache.offset, :], pad), held)

        for name in ("keys", "values"):
            rows = [row(cache, name, pad) for cache, pad in zip(caches, padding, strict=True)]
            setattr(found, name, _joined(rows))
        found.offset += longest
        found._idx = longest
        return found


class BatchPackedKVCache(BatchKVCache):
    """mlx-lm's batch of caches with keys and values as mx.quantize packs them."""

    keys: Any  # Packed, None before the first token
    values: Any
    offset: mx.array  # [B], tokens of each row
    left_padding: mx.array  # [B]
    _idx: int

    def __init__(self, left_padding: list[int], group_size: int, bits: int) -> None:
        super().__init__(left_padding)
        self.group_size, self.bits = group_size, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Packed, Packed]:
        """Add tokens [B, H, T, D]; everything that is held."""
        before, self._idx = self._idx, self._idx + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        for name, new in (("keys", keys), ("values", values)):
            packed_ = mx.quantize(new, group_size=self.group_size, bits=self.bits)
            held = self._roomy(getattr(self, name), packed_, before)
            for array, part in zip(held, packed_, strict=True):
                array[..., before : self._idx, :] = part
            setattr(self, name, held)
        found: tuple[Packed, Packed] = self.keys_and_values()
        return found

    def _roomy(self, held: Packed | None, new: Packed, used: int) -> Packed:
        if held is not None and self._idx <= held[0].shape[2]:
            return held
        steps = -(-new[0].shape[2] // self.step) * self.step
        more = _each(lambda a: mx.zeros((*a.shape[:2], steps, a.shape[3]), a.dtype), new)
        return (
            more
            if held is None
            else _each(lambda a, b: mx.concatenate([a[..., :used, :], b], axis=2), held, more)
        )

    def keys_and_values(self) -> tuple[Packed, Packed]:
        """What is held, without the room behind it."""
        return self._of_both(lambda a: a[..., : self._idx, :])

    def finalize(self) -> None:
        """Move padding from the right to the left."""
        padding: mx.array | None = self._right_padding
        if padding is None:
            return
        self.keys, self.values = self._of_both(lambda a: dynamic_roll(a, padding[:, None], axis=2))
        self.offset, self.left_padding = self.offset - padding, self.left_padding + padding
        self._right_padding = None

    def filter(self, batch_indices: Any) -> None:
        """Keep some rows."""
        keys, values, self.keys, self.values = self.keys, self.values, None, None
        if keys is not None:
            self.keys, self.values = (_each(lambda a: a[batch_indices], x) for x in (keys, values))
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        least = int(np.array(self.left_padding).min())
        if least > 0:
            if self.keys is not None:
                self.keys, self.values = self._of_both(lambda a: a[..., least:, :])
            self._idx -= least
            self.left_padding -= least

    def extend(self, other: BatchPackedKVCache) -> None:
        """Append the rows of another batch."""
        idx = max(self._idx, other._idx)
        pads = [idx - cache._idx for cache in (self, other)]
        self.left_padding = mx.concatenate(
            [c.left_padding + pad for c, pad in zip((self, other), pads, strict=True)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        some = self if self.keys is not None else other
        if some.keys is None:
            return
        for name in ("keys", "values"):
            rows = [
                _row(getattr(c, name), getattr(some, name), c, pad, idx)
                for c, pad in zip((self, other), pads, strict=True)
            ]
            setattr(self, name, _joined(rows))
        self._idx = idx

    def extract(self, idx: int) -> PackedKVCache:
        """The cache of one row."""
        found = PackedKVCache(self.group_size, self.bits)
        padding = int(np.array(self.left_padding)[idx])
        found.keys, found.values = self._of_both(
            lambda a: mx.contiguous(a[idx : idx + 1, :, padding : self._idx])
        )
        found.offset = self._idx - padding
        return found

    def _of_both(self, change: Callable[[mx.array], mx.array]) -> tuple[Packed, Packed]:
        return _each(change, self.keys), _each(change, self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, packed."""
        if self.keys is None:
            return 0
        return sum(array.nbytes for array in (*self.keys, *self.values))


def _row(
    held: Packed | None, like: Packed, cache: BatchPackedKVCache, pad: int, idx: int
) -> Packed:
    """What a batch holds, its newest token at `idx`."""
    if held is None:
        rows = cache.left_padding.shape[0]
        return _each(lambda a: mx.zeros((rows, a.shape[1], idx, a.shape[3]), a.dtype), like)
    return _each(lambda a: _left(a[..., : cache._idx, :], pad), held)


def _left(array: mx.array, pad: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (pad, 0), (0, 0)]) if pad else array


def _joined(rows: Sequence[Packed]) -> Packed:
    a, b, c = (mx.concatenate(list(parts)) for parts in zip(*rows, strict=True))
    return a, b, c


def _each(change: Callable[..., mx.array], *packed_: Packed) -> Packed:
    a, b, c = (change(*parts) for parts in zip(*packed_, strict=True))
    return a, b, c


def new_cache(model: nn.Module, kv: PackedCache | None) -> list[Any]:
    """An empty cache of each layer."""
    layers: list[Any] = make_prompt_cache(model)
    if kv is None or kv.start:
        return layers
    return [
        PackedKVCache(kv.group_size, kv.bits) if type(layer) is KVCache else layer
        for layer in layers
    ]


def pack(layers: list[Any], kv: PackedCache) -> None:
    """Pack the layers that hold as many tokens as that takes; the others stay as they are."""
    maybe_quantize_kv_cache(layers, kv.start, kv.group_size, kv.bits)


def packed(layers: Sequence[Any]) -> bool:
    """Whether any layer is packed."""
    return any(hasattr(layer, "bits") for layer in layers)


def require_packable(model: nn.Module, kv: PackedCache) -> None:
    """Raise ModelError unless the model answers with packed caches: tries one token, except where
    that would read the whole model from disk."""
    layers: list[Any] = make_prompt_cache(model)
    odd = [
        layer for layer in layers if hasattr(layer, "to_quantized") and type(layer) is not KVCache
    ]
    if odd or not any(type(layer) is KVCache for layer in layers):
        kind = type((odd or layers)[0]).__name__
        raise ModelError(
            f"--kv-bits {kv.bits}: this model keeps caches of the kind {kind}, which cannot be "
            "packed; leave it out"
        )
    if LayerStore.of(model) is not None:
        return
    mx.eval(model(mx.array([[0]]), cache=layers))
    for layer in layers:
        keys = getattr(layer, "keys", None)
        if type(layer) is KVCache and keys is not None and keys.shape[-1] % kv.group_size:
            least = keys.shape[-1] % 32 != 0
            remedy = "leave --kv-bits out" if least else "give --kv-group-size 32"
            raise ModelError(
                f"--kv-group-size {kv.group_size}: a head of this model has {keys.shape[-1]} values, "
                f"which cannot be divided by that; {remedy}"
            )
    try:
        pack(layers, PackedCache(kv.bits, kv.group_size))
        mx.eval(model(mx.array([[0]]), cache=layers))
    except Exception as problem:  # noqa: BLE001
        # Attention of a dozen architectures fails in as many ways on packed keys.
        raise ModelError(
            f"--kv-bits {kv.bits}: this model cannot answer from packed caches "
            f"({brief(' '.join(str(problem).split()))}); leave it out"
        ) from None
