"""Decoding one forward at a time, so that steering and routing belong to the token they touch.

Stock generation has the next forward queued already when it yields a token. Here a steering change
takes effect on the next token, and a token's routing is that of the forward that consumed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlxfun.calibrate import routing_sums
from mlxfun.context import SILENT, Context
from mlxfun.datasets import require_known
from mlxfun.errors import Cancelled
from mlxfun.options import GenerateOptions
from mlxfun.taps import Taps, stacked_routing

if TYPE_CHECKING:
    from mlxfun.events import Array

PREFILL_STEP = 512

OnToken = Callable[[int, int, str, "Array | None", "Array | None"], None]
"""(index, token id, text, experts [L, K] or None, weights [L, K] or None)"""
OnRouting = Callable[["Array", int], None]
"""(sums [L, S, E], tokens) of one forward, for counting chat traffic"""


@dataclass(slots=True)
class KVCache:
    """A prompt cache with the tokens it holds; valid for one state of weights and steering."""

    key: tuple[str, str]
    tokens: list[int]
    layers: list[Any]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Result of one generation."""

    tokens: tuple[int, ...]
    text: str
    cached_tokens: int
    seconds: float
    finish_reason: str


class Decoder:
    """Generates with one tapped model; keeps KV caches by (state, steering)."""

    def __init__(self, model: nn.Module, tokenizer: Any, taps: Taps, keep: int = 2) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._taps = taps
        self._keep = keep
        self._caches: list[KVCache] = []

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    def clear(self) -> None:
        """Drop every cache."""
        self._caches.clear()

    def run(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        key: Callable[[], tuple[str, str]],
        on_token: OnToken,
        on_routing: OnRouting | None = None,
        ctx: Context = SILENT,
    ) -> Decoded:
        """Answer `prompt`. `key()` names the state and steering in force at this moment.

        A cancel ends the answer at the token reached, with finish_reason "cancelled".
        """
        require_known(prompt, self._taps.anatomy.vocabulary, "the prompt")
        mx.random.seed(options.seed)
        sampler = make_sampler(temp=options.temperature, top_p=options.top_p)
        started = key()
        cache = self._take(started, prompt)
        cached = len(cache.tokens)
        begin = monotonic()
        produced: list[int] = []
        detokenizer = self._tokenizer.detokenizer
        detokenizer.reset()
        with self._taps.recording(norms=on_routing is not None):
            try:
                logits = self._prefill(prompt, cache, on_routing, ctx)
                reason = self._decode(
                    logits,
                    cache,
                    options,
                    sampler,
                    (detokenizer, produced, on_token, on_routing),
                    ctx,
                )
            except Cancelled:
                reason = "cancelled"
        detokenizer.finalize()
        if key() == started:
            # Steering that changed half-way leaves keys and values of two models in the cache.
            self._put(cache)
        return Decoded(tuple(produced), detokenizer.text, cached, monotonic() - begin, reason)

    def _take(self, key: tuple[str, str], prompt: Sequence[int]) -> KVCache:
        """The longest cache whose tokens begin the prompt, trimmed to what it shares with it."""
        best: KVCache | None = None
        best_shared = 0
        for cache in self._caches:
            if cache.key != key:
                continue
            shared = _common_prefix(cache.tokens, prompt)
            extra = len(cache.tokens) - min(shared, len(prompt) - 1)
            usable = extra == 0 or can_trim_prompt_cache(cache.layers)
            if usable and shared > best_shared:
                best, best_shared = cache, shared
        if best is None:
            return KVCache(key, [], make_prompt_cache(self._model))
        self._caches.remove(best)
        # One token at least must be run to have logits.
        shared = min(best_shared, len(prompt) - 1)
        if len(best.tokens) > shared:
            trim_prompt_cache(best.layers, len(best.tokens) - shared)
            del best.tokens[shared:]
        return best

    def _put(self, cache: KVCache) -> None:
        self._caches.append(cache)
        del self._caches[: -self._keep]

    def _prefill(
        self, prompt: Sequence[int], cache: KVCache, on_routing: OnRouting | None, ctx: Context
    ) -> mx.array:
        logits = None
        while len(cache.tokens) < len(prompt):
            ctx.check()
            chunk = list(prompt[len(cache.tokens) : len(cache.tokens) + PREFILL_STEP])
            logits = self._forward(chunk, cache, on_routing, [])
            if len(prompt) > PREFILL_STEP:
                ctx.progress("reading the prompt", len(cache.tokens), len(prompt), "tokens")
        if logits is None:
            raise ValueError("an empty prompt cannot be continued")
        return logits

    def _forward(
        self, tokens: list[int], cache: KVCache, on_routing: OnRouting | None, out: list[Any]
    ) -> mx.array:
        """Run `tokens` through the model: logits [1, V] of the last one.

        `out` receives (experts, weights) [L, K] when one token was run.
        """
        logits: mx.array = self._model(mx.array([tokens]), cache=cache.layers)[:, -1]
        cache.tokens.extend(tokens)
        records = self._taps.drain()
        lazy = [a for layer in records for record in layer for a in record.arrays()]
        if on_routing is None:
            mx.eval(logits, *lazy)
        else:
            sums = routing_sums(self._taps, records, mx.ones(len(tokens)))
            mx.eval(logits, sums, *lazy)
            on_routing(np.array(sums), len(tokens))
        if len(tokens) == 1:
            experts, weights = stacked_routing(records, self._taps.anatomy.top_k)
            out.append((experts[:, 0], weights[:, 0]))
        return logits

    def _decode(
        self,
        logits: mx.array,
        cache: KVCache,
        options: GenerateOptions,
        sampler: Callable[[mx.array], mx.array],
        sink: tuple[Any, list[int], OnToken, OnRouting | None],
        ctx: Context,
    ) -> str:
        detokenizer, produced, on_token, on_routing = sink
        for index in range(options.max_tokens):
            # mlx-lm's samplers take log-probabilities.
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            token = int(np.array(sampler(logprobs)).item())
            if token in self._tokenizer.eos_token_ids:
                return "stop"
            produced.append(token)
            detokenizer.add_token(token)
            text = detokenizer.last_segment
            if index + 1 == options.max_tokens:
                on_token(index, token, text, None, None)
                return "length"
            ctx.check()
            ctx.interlude()
            routing: list[Any] = []
            logits = self._forward([token], cache, on_routing, routing)
            on_token(index, token, text, *routing[0])
        return "length"


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
