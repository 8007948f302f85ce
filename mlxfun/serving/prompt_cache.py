"""KV caches of prompts and answers, kept for prompts that begin alike, within a budget of bytes.

Keyed by state and steering: a cache that was made under other weights is never looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxfun.generation.kv_cache import Key, arrays_of, can_shorten

if TYPE_CHECKING:
    from mlxfun.arrays import Array


@dataclass(slots=True, eq=False)
class _Kept:
    key: Key
    tokens: Array  # int32 [T], what was fed
    layers: list[Any]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Begun:
    """A cache to go on with: layers, None for an empty one, that hold the first `tokens` tokens."""

    layers: list[Any] | None
    tokens: int


class PromptCache:
    """The least recently used caches go first when `most_bytes` are exceeded."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: list[_Kept] = []

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.nbytes for kept in self._kept)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()

    def begin(self, key: Key, prompt: Sequence[int]) -> Begun:
        """A copy of the cache that shares most with the beginning of `prompt`.

        At least one token of the prompt is left to be read: its logits are what the answer begins
        with. A cache that cannot be shortened counts only if it is a prefix as a whole.
        """
        asked = np.asarray(prompt, dtype=np.int32)
        best: _Kept | None = None
        most = 0
        for kept in self._kept:
            if kept.key != key:
                continue
            shared = min(_shared(kept.tokens, asked), len(asked) - 1)
            extra = len(kept.tokens) - shared
            usable = extra == 0 or can_shorten(kept.layers, extra)
            if usable and shared > most:
                best, most = kept, shared
        if best is None:
            return Begun(None, 0)
        self._kept.remove(best)
        self._kept.append(best)  # used last
        # Arrays are copied when they are written to, so this shares what stays the same.
        layers = copy.deepcopy(best.layers)
        if len(best.tokens) > most:
            trim_prompt_cache(layers, len(best.tokens) - most)
        return Begun(layers, most)

    def keep(self, key: Key, tokens: Sequence[int], layers: list[Any]) -> None:
        """Keep a cache that holds `tokens`; those which it makes superfluous are dropped."""
        fed = np.asarray(tokens, dtype=np.int32)
        nbytes = sum(layer.nbytes for layer in layers)
        if not len(fed) or nbytes > self._most_bytes:
            return
        # What is taken out of a batch is a lazy slice of it: until that is computed, all of the
        # batch is held.
        mx.async_eval([array for layer in layers for array in arrays_of(layer.state)])
        trimmable = can_trim_prompt_cache(layers)
        self._kept = [kept for kept in self._kept if not _covered(kept, key, fed, trimmable)]
        self._kept.append(_Kept(key, fed, layers, nbytes))
        while self.nbytes > self._most_bytes:
            del self._kept[0]


def _covered(kept: _Kept, key: Key, fed: Array, trimmable: bool) -> bool:
    """Whether a cache of the tokens `fed` serves whatever `kept` does."""
    if kept.key != key or len(kept.tokens) > len(fed):
        return False
    same = _shared(kept.tokens, fed) == len(kept.tokens)
    return same and (trimmable or len(kept.tokens) == len(fed))


def _shared(a: Array, b: Array) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
