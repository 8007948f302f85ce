"""What a trace is run on: texts or token ids, as one padded batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlxfun.arrays import Array
from mlxfun.data.datasets import Tokenizer, require_known
from mlxfun.errors import UsageError

Padding = Literal["left", "right"]
Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt] | mx.array | np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: int [B, T], padded with 0. first, past: int [B], where a row's own tokens begin, and
    the position after its last. Positions that people give count a row's own tokens."""

    tokens: Array
    first: Array
    past: Array

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the batch."""
        return bool((self.first > 0).any() or (self.past < self.tokens.shape[1]).any())

    @property
    def rows(self) -> list[list[int]]:
        """Each row's own tokens."""
        ends = zip(self.tokens, self.first, self.past, strict=True)
        return [row[a:b].tolist() for row, a, b in ends]


def encode(tokenizer: Tokenizer, prompts: Prompts, vocabulary: int | None) -> list[list[int]]:
    """Token ids of each prompt. Raises UsageError for an empty one, DatasetError for a token that
    the model does not have."""
    if isinstance(prompts, mx.array | np.ndarray):
        rows = np.array(prompts)
        if not np.issubdtype(rows.dtype, np.integer) or rows.ndim not in (1, 2):
            raise UsageError(
                f"a prompt of {rows.dtype} {list(rows.shape)} is no token ids; give integers [T] "
                "or [B, T]"
            )
        ids: list[list[int]] = np.atleast_2d(rows).tolist()
    else:
        single = isinstance(prompts, str) or _is_ids(prompts)
        many: Iterable[Any] = [prompts] if single else prompts
        ids = [
            tokenizer.encode(one) if isinstance(one, str) else [int(i) for i in one] for one in many
        ]
    if not ids or not all(ids):
        raise UsageError("a prompt is empty: give text, or at least one token id")
    for row in ids:
        if min(row) < 0:
            raise UsageError(f"token {min(row)} is negative; token ids begin at 0")
        require_known(row, vocabulary, "the prompt")
    return ids


def _is_ids(prompts: Any) -> bool:
    return all(isinstance(one, int | np.integer) for one in prompts)


def padded(rows: Sequence[Sequence[int]], side: Padding = "right") -> Batch:
    """Rows of one length, padded at their end or at their beginning."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    lengths = np.array([len(row) for row in rows])
    first = width - lengths if side == "left" else np.zeros_like(lengths)
    for place, row in enumerate(rows):
        tokens[place, first[place] : first[place] + len(row)] = row
    return Batch(tokens, first, first + lengths)


def left_padded_cache(model: nn.Module, batch: Batch) -> list[Any]:
    """A prompt cache that hides the padding at the beginning of rows, as mlx-lm's own batches do.

    Raises UsageError for a kind of cache that cannot.
    """
    left = batch.first.tolist()
    return [_batched(one, left) for one in make_prompt_cache(model)]


def _batched(cache: Any, left: list[int]) -> Any:
    if type(cache) is KVCache:
        return BatchKVCache(left)
    if type(cache) is RotatingKVCache:
        return BatchRotatingKVCache(cache.max_size, left)
    if isinstance(cache, ArraysCache):
        cache.left_padding = mx.array(left)
        return cache
    if isinstance(cache, CacheList):
        cache.caches = tuple(_batched(one, left) for one in cache.caches)
        return cache
    raise UsageError(
        f"rows of this model cannot be padded on the left (its cache is a {type(cache).__name__}); "
        "pad on the right"
    )
