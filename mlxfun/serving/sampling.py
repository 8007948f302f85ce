"""Drawing tokens for one request among others: its own random numbers, bias and penalties."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_logits_processors,
)

from mlxfun.data.datasets import Tokenizer
from mlxfun.serving.ask import Ask, Sampling
from mlxfun.serving.grammar import CallConstraint, Constraint

Processor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far int [T], logits [1, V]) -> logits [1, V]"""


class RequestSampler:
    """Draws from log-probabilities [1, V], filtered in the order of mlx-lm's `make_sampler`: top-p,
    min-p, top-k; then the temperature. Its random numbers are no other request's."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.key: Any = mx.random.key(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """The next token, [1]; lazy."""
        s = self._sampling
        if 0 < s.top_p < 1:
            logprobs = apply_top_p(logprobs, s.top_p)
        if s.min_p > 0:
            logprobs = apply_min_p(logprobs, s.min_p)
        if 0 < s.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, s.top_k)
        self.key, now = mx.random.split(self.key)
        return mx.random.categorical(logprobs * (1.0 / s.temperature), key=now)


def sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """The sampler of a request. All greedy ones are the same object: a batch of them takes one
    argmax and not one a row."""
    chosen: Callable[[mx.array], mx.array] = (
        greedy_sampler if sampling.temperature == 0 else RequestSampler(sampling)
    )
    return chosen


def processors(sampling: Sampling) -> list[Processor]:
    """What changes the logits of a request before a token is drawn."""
    found: list[Processor] = make_logits_processors(
        dict(sampling.logit_bias) or None,
        sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        sampling.context,
        sampling.presence_penalty or None,
        sampling.context,
        sampling.frequency_penalty or None,
        sampling.context,
    )
    return found


def processors_of(ask: Ask, tokenizer: Tokenizer, vocabulary: int | None) -> list[Processor]:
    """The same for a request: what its schema, or its tools, allow comes last."""
    found = processors(ask.sampling)
    if ask.grammar is None and ask.calls is None:
        return found
    size = vocabulary or len(tokenizer)  # type: ignore[arg-type]
    after = getattr(tokenizer, "think_end_tokens", None) if ask.thinking else None
    stops = tokenizer.eos_token_ids
    if ask.grammar is not None:
        found.append(Constraint(ask.grammar, tokenizer, size, stops, after or ()))
    if ask.calls is not None:
        found.append(CallConstraint(ask.calls, tokenizer, size, stops, after or ()))
    return found


class AloneSampler:
    """All of that behind the interface of `mlxfun.generation.sampling.Sampler`, for a request that
    is decoded alone. rows: log-probabilities [V] of each token drawn, where they are wanted."""

    def __init__(self, ask: Ask, process: list[Processor]) -> None:
        self._draw = sampler(ask.sampling)
        self._processors = process
        tail = ask.prompt[-ask.sampling.context :]
        self._context: deque[mx.array] = deque([mx.array(tail)], ask.sampling.context)
        self._keep = ask.top_logprobs is not None
        self.rows: list[mx.array] = []

    @property
    def key(self) -> Any:
        """Where the random numbers are. The weights do not change while a request is served, so
        that nothing ever goes back there."""
        return None

    @key.setter
    def key(self, key: Any) -> None:
        raise NotImplementedError("the model changed in the middle of an answer")

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, [1], of logits [1, V]; lazy."""
        if self._processors:
            context = mx.concatenate(list(self._context))
            for process in self._processors:
                logits = process(context, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = self._draw(logprobs)
        if self._processors:
            self._context.append(token)
        if self._keep:
            self.rows.append(logprobs[0])
        return token
