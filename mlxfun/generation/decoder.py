"""Token-by-token decoding, so that steering and routing records apply to exact tokens.

Stock generation has the next forward queued already when it yields a token. Here a steering change
takes effect on the next token, and a token's routing is that of the forward that consumed it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlxfun.calibration.collect import routing_sums
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer, require_known
from mlxfun.errors import Cancelled
from mlxfun.generation.options import GenerateOptions
from mlxfun.hooks.routing import Record, Taps, stacked_routing

if TYPE_CHECKING:
    from mlxfun.arrays import Array

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


Steps = Generator[None, None, Decoded]
"""An answer on its way, see `Decoder.steps`."""


def advance(steps: Steps) -> Decoded | None:
    """Take the next step of an answer; what came of it once it is over, None before."""
    try:
        next(steps)
    except StopIteration as over:
        decoded: Decoded = over.value
        return decoded
    return None


class Decoder:
    """Generates with one tapped model; keeps KV caches by (state, steering)."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, taps: Taps, keep: int = 2) -> None:
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
        """Answer `prompt` to its end; see `steps`. Between two tokens waiting jobs take their turn."""
        steps = self.steps(prompt, options, key, on_token, on_routing, ctx)
        while True:
            decoded = advance(steps)
            if decoded is not None:
                return decoded
            ctx.interlude()

    def steps(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        key: Callable[[], tuple[str, str]],
        on_token: OnToken,
        on_routing: OnRouting | None = None,
        ctx: Context = SILENT,
    ) -> Steps:
        """An answer to `prompt`, step by step: the prompt is read, then each step is one token.

        Answers may take turns on the model: each has a KV cache and random numbers of its own, and
        between two steps nothing of it is left behind. Whoever takes a step sees to it that what
        `key()` names, the state and steering in force, is live then. Nothing happens before the
        first step. A cancel ends the answer at the token reached, with finish_reason "cancelled".
        """
        require_known(prompt, self._taps.anatomy.vocabulary, "the prompt")
        draw = _Draws(options)
        started = key()
        cache = self._take(started, prompt)
        cached = len(cache.tokens)
        begin = monotonic()
        produced: list[int] = []
        detokenizer = self._tokenizer.detokenizer
        detokenizer.reset()
        reason, pure = "length", True
        try:
            logits = self._prefill(prompt, cache, on_routing, ctx)
            for index in range(options.max_tokens):
                yield
                # Steering that changed half-way leaves keys and values of two models in the cache,
                # also when it is back by the end.
                pure = pure and key() == started
                ctx.check()
                token = draw(logits)
                if token in self._tokenizer.eos_token_ids:
                    reason = "stop"
                    break
                produced.append(token)
                detokenizer.add_token(token)
                routing: tuple[Array | None, Array | None] = (None, None)
                if index + 1 < options.max_tokens:
                    logits, records = self._forward([token], cache, on_routing)
                    if records:  # none of a dense model
                        experts, weights = stacked_routing(records, self._taps.anatomy.top_k)
                        routing = experts[:, 0], weights[:, 0]
                on_token(index, token, detokenizer.last_segment, *routing)
        except Cancelled:
            reason = "cancelled"
        detokenizer.finalize()
        if pure:
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
            logits, _ = self._forward(chunk, cache, on_routing)
            if len(prompt) > PREFILL_STEP:
                ctx.progress("reading the prompt", len(cache.tokens), len(prompt), "tokens")
        if logits is None:
            raise ValueError("an empty prompt cannot be continued")
        return logits

    def _forward(
        self, tokens: list[int], cache: KVCache, on_routing: OnRouting | None
    ) -> tuple[mx.array, list[list[Record]]]:
        """Run `tokens` through the model: logits [1, V] of the last one, what was recorded."""
        # The taps are shared: outside of its own forwards an answer must not be recording.
        with self._taps.recording(norms=on_routing is not None) as recording:
            logits: mx.array = self._model(mx.array([tokens]), cache=cache.layers)[:, -1]
            records = recording.drain()
        cache.tokens.extend(tokens)
        lazy = [a for layer in records for record in layer for a in record.arrays()]
        if on_routing is None:
            mx.eval(logits, *lazy)
        else:
            sums = routing_sums(self._taps, records, mx.ones(len(tokens)))
            mx.eval(logits, sums, *lazy)
            on_routing(np.array(sums), len(tokens))
        return logits, records


class _Draws:
    """Picks tokens, with random numbers that no other answer draws from."""

    def __init__(self, options: GenerateOptions) -> None:
        self._sampler = make_sampler(temp=options.temperature, top_p=options.top_p)
        self._random = options.temperature > 0
        self._seed = options.seed

    def __call__(self, logits: mx.array) -> int:
        # mlx-lm's samplers take log-probabilities.
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if not self._random:
            return int(np.array(self._sampler(logprobs)).item())
        # They draw from MLX's one generator, whose state is the two halves of a seed: seeding with
        # it goes on where this answer was.
        mx.random.seed(self._seed)
        token = int(np.array(self._sampler(logprobs)).item())
        state: Any = mx.random.state
        high, low = np.array(state[0]).tolist()
        self._seed = high << 32 | low
        return token


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
