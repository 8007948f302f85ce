"""Decoding with one step in flight, in which steering and edits still act on the next token.

While the device runs the forward that consumes one token, the host reads and reports the token
before it. The forward in flight was queued under some weights and steering; if these change before
its turn comes, it is dropped and queued again. So a change takes effect on the next token that is
sampled, exactly as if nothing had been queued ahead, and a token's routing is that of the forward
that consumed it.

The routing of a step is stacked on the device, [L, K] for experts and weights, and copied to the
host once a token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.calibration.collect import layer_sums
from mlxfun.checkpoint.options import PackedCache
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer, require_known
from mlxfun.errors import Cancelled
from mlxfun.generation.kv_cache import CachePool, Key, KVCache
from mlxfun.generation.options import FinishReason, GenerateOptions
from mlxfun.generation.sampling import Sampler
from mlxfun.hooks.routing import Taps
from mlxfun.hooks.step_routing import StepRouting
from mlxfun.model.device.hints import announce
from mlxfun.model.device.memory import on_cuda

if TYPE_CHECKING:
    from mlxfun.arrays import Array

PREFILL_STEP = 2048

OnToken = Callable[[int, int, str, "Array | None", "Array | None"], None]
"""(index, token id, text, experts [L, K] or None, weights [L, K] or None)"""


class Draws(Protocol):
    """What draws tokens; `mlxfun.generation.sampling.Sampler` is one."""

    key: Any
    """Where the random numbers are; setting it goes back there."""

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, [1], of logits [1, V]; lazy."""


class Counter(Protocol):
    """Counts the routing of the forwards of an answer."""

    def prompt(self, sums: Array, tokens: int) -> None:
        """Add a part of the prompt: its sums [L, S, E] in the order of stats.SUMS."""

    def token(self, experts: Array, weights: Array, norms: Array) -> None:
        """Add one decoded token: experts int32 [L, K], -1 where unused; weights and norms of the
        experts' outputs, float32 [L, K]."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Result of one generation."""

    tokens: tuple[int, ...]
    text: str
    cached_tokens: int
    seconds: float
    finish_reason: FinishReason


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


@dataclass(frozen=True, slots=True)
class _Flight:
    """A queued forward. key: what it was queued under. token: what it consumes, int [1]; next: the
    token sampled from its logits; random: where the sampler stood before; routing: its own."""

    key: Key
    token: mx.array
    next: mx.array
    random: Any
    routing: StepRouting | None


class Decoder:
    """Generates with one tapped model; keeps KV caches by (state, steering).

    sampler: makes what draws the tokens of an answer from its options. kv: how caches are packed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        taps: Taps,
        sampler: Callable[[Any], Draws] = Sampler,
        kv: PackedCache | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._taps = taps
        self._caches = CachePool(model, kv=kv)
        self._sampler = sampler

    @property
    def tokenizer(self) -> Tokenizer:
        """What texts are encoded with."""
        return self._tokenizer

    def clear(self) -> None:
        """Drop every cache."""
        self._caches.clear()

    def cached(self, key: Key, prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` an answer would find in a cache now."""
        return self._caches.cached(key, prompt)

    def run(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        key: Callable[[], Key],
        on_token: OnToken,
        counter: Counter | None = None,
        ctx: Context = SILENT,
    ) -> Decoded:
        """Answer `prompt` to its end; see `steps`. Between two tokens waiting jobs take their turn."""
        steps = self.steps(prompt, options, key, on_token, counter, ctx)
        while True:
            decoded = advance(steps)
            if decoded is not None:
                return decoded
            ctx.interlude()

    def steps(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        key: Callable[[], Key],
        on_token: OnToken,
        counter: Counter | None = None,
        ctx: Context = SILENT,
    ) -> Steps:
        """An answer to `prompt`, step by step: the prompt is read, then each step is one token.

        Answers may take turns on the model: each has a KV cache and random numbers of its own, and
        what is in flight of one does not depend on what is live later. The caller must make what
        `key()` names, the state and steering in force, live before each step. Nothing happens
        before the first step. A cancel ends the answer at the token reached, with finish_reason
        "cancelled".
        """
        require_known(prompt, self._taps.anatomy.vocabulary, "the prompt")
        if on_cuda():  # a first answer waits for the compiler; a CPU's BLAS matters in passes only
            announce(ctx)
        cache = self._caches.take(key(), prompt)
        draws, grown = self._sampler(options), self._caches.before_forward
        answer = _Answer(self._model, self._taps, cache, draws, counter, grown)
        cached, begin = len(cache.tokens), monotonic()
        detokenizer = self._tokenizer.detokenizer
        detokenizer.reset()
        produced: list[int] = []
        reason: FinishReason = "length"
        try:
            answer.prefill(prompt, key, options.max_tokens > 1, ctx)
            for index in range(options.max_tokens):
                yield
                ctx.check()
                token = answer.settle(key)
                if token in self._tokenizer.eos_token_ids:
                    reason = "stop"
                    break
                produced.append(token)
                routing = answer.consume(key, index + 2 < options.max_tokens)
                detokenizer.add_token(token)
                on_token(index, token, detokenizer.last_segment, *routing)
        except Cancelled:
            reason = "cancelled"
        answer.land()
        detokenizer.finalize()
        self._caches.put(cache)
        return Decoded(tuple(produced), detokenizer.text, cached, monotonic() - begin, reason)


class _Answer:
    """The device's side of one answer: its cache, its sampler and the step in flight.

    `token` is the newest sampled token, of which the forward may be in flight.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        cache: KVCache,
        sampler: Draws,
        counter: Counter | None,
        grown: Callable[[KVCache], None],
    ) -> None:
        self._model, self._taps, self._cache = model, taps, cache
        self._sampler, self._counter, self._grown = sampler, counter, grown
        self._token: mx.array | None = None
        self._flight: _Flight | None = None

    def prefill(
        self, prompt: Sequence[int], key: Callable[[], Key], more: bool, ctx: Context
    ) -> None:
        """Read the prompt, sample the first token, and queue its forward if `more`."""
        cache, logits = self._cache, None
        while len(cache.tokens) < len(prompt):
            ctx.check()
            chunk = list(prompt[len(cache.tokens) : len(cache.tokens) + PREFILL_STEP])
            self._grown(cache)
            logits = self._read(chunk)
            cache.tokens.extend(chunk)
            if len(prompt) > PREFILL_STEP:
                ctx.progress("reading the prompt", len(cache.tokens), len(prompt), "tokens")
        if logits is None:
            raise ValueError("an empty prompt cannot be continued")
        self._token = self._sampler(logits)
        mx.async_eval(self._token)
        if more:
            self._queue(key())

    def _read(self, chunk: list[int]) -> mx.array:
        """Logits [1, V] after a part of the prompt, evaluated with the cache."""
        with self._cache.whole():
            return self._forward(chunk)

    def _forward(self, chunk: list[int]) -> mx.array:
        tokens = mx.array([chunk])
        if self._counter is None:
            logits: mx.array = self._model(tokens, cache=self._cache.layers)[:, -1]
            mx.eval(logits)
            return logits
        mask = mx.ones(len(chunk))
        with self._taps.reducing(lambda tap, r: layer_sums(tap.layer, [r], mask)) as reduction:
            logits = self._model(tokens, cache=self._cache.layers)[:, -1]
            sums = mx.stack(reduction.drain()) if self._taps.layers else None
        mx.eval(logits, *([sums] if sums is not None else []))
        if sums is not None:
            self._counter.prompt(np.array(sums), len(chunk))
        return logits

    def _queue(self, key: Key) -> None:
        """Queue the forward that consumes the newest token, and the token that comes of it."""
        token, cache = self._token, self._cache
        assert token is not None
        self._grown(cache)
        cache.begin_step()
        cache.pure = cache.pure and key == cache.key
        counted = self._counter is not None
        with cache.whole(), self._taps.stepping(norms=counted) as stepping:
            logits = self._model(token[:, None], cache=cache.layers)[:, -1]
            routing = stepping.stacked()
        random = self._sampler.key
        sampled = self._sampler(logits)
        mx.async_eval(sampled, *(routing.arrays() if routing is not None else ()))
        self._flight = _Flight(key, token, sampled, random, routing)

    def settle(self, key: Callable[[], Key]) -> int:
        """The newest token. What is in flight behind it is queued anew if the model has changed."""
        flight = self._flight
        if flight is not None and flight.key != key():
            self._cache.take_back()
            self._sampler.key, self._flight = flight.random, None
            self._queue(key())
        assert self._token is not None
        return _number(self._token)

    def consume(self, key: Callable[[], Key], more: bool) -> tuple[Array | None, Array | None]:
        """Let the newest token be consumed: (experts, weights) [L, K] of the forward that does it,
        None without one. Its successor's forward is queued first if `more`, so that the device
        has work while the host looks at this one.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None, None
        self._cache.tokens.append(_number(flight.token))
        self._token = flight.next
        if more:
            self._queue(key())
        if flight.routing is None:
            return None, None
        experts, weights, norms = flight.routing.on_host()
        if self._counter is not None and norms is not None:
            self._counter.token(experts, weights, norms)
        return experts, weights

    def land(self) -> None:
        """The answer is over: what is in flight has consumed a token, which the cache now holds."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._cache.tokens.append(_number(flight.token))
            mx.eval(flight.next)


def _number(token: mx.array) -> int:
    """A token id on the host; waits until it is known."""
    return cast(int, token.item())
