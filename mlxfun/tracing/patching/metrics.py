"""Metrics: what an answer is measured by. From the logits of the last token, [B, V], to [B].

logit_diff     z[answer] - z[other]
probability    softmax(z)[answer]
kl             KL(clean || z), 0 where the prediction is the clean run's
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import UsageError
from mlxfun.tracing.options import METRICS, MetricName

Metric = Callable[[mx.array], mx.array]
"""Logits of the last token [B, V], float32 -> one number a row, [B]; differentiable."""

TokenLike = str | int


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric in use. name: for reports. answer, other: token ids, None where it has none."""

    name: str
    metric: Metric
    answer: int | None = None
    other: int | None = None


def token_id(tokenizer: Tokenizer, token: TokenLike) -> int:
    """The id of a token: a number, "#" and a number, or a text that is one token.

    Raises UsageError for a text of several tokens: its first one might be a mere space.
    """
    if isinstance(token, int):
        return token
    if token.startswith("#") and token[1:].isdigit():
        return int(token[1:])
    try:
        ids = tokenizer.encode(token, add_special_tokens=False)
    except TypeError:
        ids = tokenizer.encode(token)
    if len(ids) != 1:
        parts = " ".join(repr(tokenizer.decode([i])) for i in ids)
        raise UsageError(
            f"{token!r} is {len(ids)} tokens of this tokenizer ({parts}); give one that is a single "
            "token, mostly with a space ahead of it, or a token id"
        )
    return int(ids[0])


def measured(
    metric: MetricName | Metric,
    tokenizer: Tokenizer,
    answers: tuple[TokenLike, ...],
    clean: mx.array,
    corrupted: mx.array,
) -> Measured:
    """A metric by name, or an own function. clean, corrupted: logits [V] of the two runs.

    answers: (answer,) or (answer, other); by default what the clean and the corrupted run say.
    Raises UsageError for an unknown metric, or where both runs say the same.
    """
    if callable(metric):
        return Measured(getattr(metric, "__name__", "own function"), metric)
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}")
    if metric == "kl":
        return Measured("kl", kl_from(clean))
    ids = [token_id(tokenizer, token) for token in answers]
    answer = ids[0] if ids else int(np.array(mx.argmax(clean)))
    if metric == "probability":
        return Measured("probability", probability_of(answer), answer)
    other = ids[1] if len(ids) > 1 else int(np.array(mx.argmax(corrupted)))
    if answer == other:
        raise UsageError(
            f"logit_diff needs two different tokens, and both are {tokenizer.decode([answer])!r}; "
            "give the answer and another one"
        )
    return Measured("logit_diff", logit_diff(answer, other), answer, other)


def logit_diff(answer: int, other: int) -> Metric:
    """z[answer] - z[other]."""
    return lambda logits: logits[:, answer] - logits[:, other]


def probability_of(answer: int) -> Metric:
    """softmax(z)[answer]."""
    return lambda logits: mx.exp(logits[:, answer] - mx.logsumexp(logits, axis=-1))


def kl_from(clean: mx.array) -> Metric:
    """KL(clean || z), in nats. clean: logits [V]."""
    clean = clean.astype(mx.float32)
    log_p = clean - mx.logsumexp(clean)
    p = mx.exp(log_p)
    return lambda logits: mx.sum(
        p * (log_p - (logits - mx.logsumexp(logits, axis=-1, keepdims=True))), axis=-1
    )
