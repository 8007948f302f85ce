"""KV caches of answers: kept by state and steering, bounded by bytes, taken back by a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, can_trim_prompt_cache, trim_prompt_cache

from mlxfun.checkpoint.options import PackedCache
from mlxfun.generation.packed_cache import new_cache, pack, packed

Key = tuple[str, str]
"""(state of the weights, steering in force), as Editor.key gives it."""

KEPT = 4
"""Caches that are kept at most: both sides of an A/B, the conversation, and a state before an undo."""

MOST_BYTES = 4 << 30
"""Bytes that kept caches may hold together, the newest excepted."""


@dataclass(slots=True)
class KVCache:
    """The cache of one answer with the tokens that were fed. key: what it is valid for.

    layers: as `make_prompt_cache` makes them. pure: whether all of it was made under `key`.
    """

    key: Key
    tokens: list[int]
    layers: list[Any]
    pure: bool = True
    _before: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in it."""
        return sum(a.nbytes for layer in self.layers for a in arrays_of(layer.state))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A forward inside the block that does not come to its end leaves some layers behind
        others: the cache is of no use after this answer."""
        try:
            yield
        except BaseException:
            self.pure = False
            raise

    def begin_step(self) -> None:
        """Remember what `take_back` needs, where a step cannot be trimmed away."""
        trimmable = can_trim_prompt_cache(self.layers)
        self._before = [] if trimmable else [_snapshot(layer) for layer in self.layers]

    def take_back(self) -> None:
        """Forget the one token that was fed since `begin_step`."""
        if self._before:
            for layer, before in zip(self.layers, self._before, strict=True):
                _restore(layer, before)
        else:
            trim_prompt_cache(self.layers, 1)


def can_shorten(layers: list[Any], tokens: int) -> bool:
    """Whether the last `tokens` tokens can be taken off, and what is left is all that is needed.

    A chunked cache has dropped what lies before its last chunk: it cannot go back behind that.
    """
    return can_trim_prompt_cache(layers) and all(_reaches(layer, tokens) for layer in layers)


def _reaches(layer: Any, tokens: int) -> bool:
    if not isinstance(layer, ChunkedKVCache):
        return True
    begin = (layer.offset - tokens) // layer.chunk_size * layer.chunk_size
    return bool(layer.start_position <= begin)


def arrays_of(tree: Any) -> list[mx.array]:
    """The arrays in the state of a layer's cache."""
    flat = cast(list[tuple[str, Any]], tree_flatten(tree))
    return [leaf for _, leaf in flat if isinstance(leaf, mx.array)]


def _snapshot(layer: Any) -> Any:
    """The attributes of a layer's cache. Arrays are given an alias of their own: caches write in
    place, into the array object that they hold."""
    if hasattr(layer, "caches"):
        return [_snapshot(inner) for inner in layer.caches]
    return {name: _alias(value) for name, value in vars(layer).items()}


def _alias(value: Any) -> Any:
    if isinstance(value, mx.array):
        return mx.stop_gradient(value)
    return [_alias(v) for v in value] if isinstance(value, list) else value


def _restore(layer: Any, before: Any) -> None:
    if isinstance(before, list):
        for inner, state in zip(layer.caches, before, strict=True):
            _restore(inner, state)
    else:
        vars(layer).update(before)


class CachePool:
    """Caches kept for later answers, the oldest first. kv: how they are packed; one pool holds
    caches of one kind."""

    def __init__(
        self, model: nn.Module, most_bytes: int = MOST_BYTES, kv: PackedCache | None = None
    ) -> None:
        self._model, self._most_bytes, self._kv = model, most_bytes, kv
        self._kept: list[KVCache] = []

    def clear(self) -> None:
        """Drop every cache."""
        self._kept.clear()

    def before_forward(self, cache: KVCache) -> None:
        """Pack a cache that has grown long enough for it."""
        if self._kv is not None:
            pack(cache.layers, self._kv)

    def take(self, key: Key, prompt: Sequence[int]) -> KVCache:
        """The longest cache whose tokens begin the prompt, trimmed to what it shares with it."""
        best, shared = self._best(key, prompt)
        if best is None:
            return KVCache(key, [], new_cache(self._model, self._kv))
        self._kept.remove(best)
        if len(best.tokens) > shared:
            trim_prompt_cache(best.layers, len(best.tokens) - shared)
            del best.tokens[shared:]
        return best

    def cached(self, key: Key, prompt: Sequence[int]) -> int:
        """How many tokens the cache that `take` would give holds."""
        return self._best(key, prompt)[1]

    def _best(self, key: Key, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """The cache to begin with, and how many of its tokens are of use: one token of the prompt
        at least must be run to have logits."""
        best: KVCache | None = None
        best_shared = 0
        for cache in self._kept:
            if cache.key != key:
                continue
            shared = _common_prefix(cache.tokens, prompt)
            extra = len(cache.tokens) - min(shared, len(prompt) - 1)
            usable = extra == 0 or can_shorten(cache.layers, extra)
            # What is shorter than that would not be packed.
            late = self._kv is not None and shared < self._kv.start and packed(cache.layers)
            if usable and not late and shared > best_shared:
                best, best_shared = cache, shared
        return best, min(best_shared, len(prompt) - 1) if best is not None else 0

    def put(self, cache: KVCache) -> None:
        """Keep a cache, if all of it was made under its key."""
        if not cache.pure:
            return
        self._kept.append(cache)
        del self._kept[:-KEPT]
        while len(self._kept) > 1 and sum(c.nbytes for c in self._kept) > self._most_bytes:
            del self._kept[0]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
