"""Perplexity, token-level KL and top-1 agreement of a state of the weights against others.

One forward of the evaluation set measures a state. The states it is compared with contribute their
post-norm hidden states, cached once in float16, from which their own output head, as it was then,
makes their logits again (error of the mean KL below 2e-6): the head, or the embedding it is tied
to, may have been edited since. Models that change the logits after the head (softcaps, scales) are
compared by a second forward instead.

With p the reference's and q the subject's distribution at a token, KL = sum_v p (ln p - ln q), in
nats. Perplexity is exp of the mean negative log-likelihood over tokens; its 95 % interval treats
sequences, not tokens, as the independent units (ratio estimator, normal approximation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from math import exp, sqrt
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Batch, batches
from mlxfun.errors import DatasetError
from mlxfun.hooks.head import HeadTap, Logits
from mlxfun.model.distributions import log_softmax

if TYPE_CHECKING:
    from mlxfun.arrays import Array

LOGITS_BYTES = 256 << 20
"""Target size of one batch's float32 logits."""

HALF_LIMIT = 6.0e4
"""Hidden states beyond this do not fit float16 and are kept as they are."""

CACHED_STATES = 6

StateKey = tuple[str, str]
"""(state of the weights, steering in force), as `Editor.key` names what is live."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    """A named data set: token sequences int32 [T] each."""

    name: str
    sequences: tuple[Array, ...]

    @property
    def digest(self) -> str:
        """Identity of the tokens."""
        h = blake2b(digest_size=12)
        for sequence in self.sequences:
            h.update(len(sequence).to_bytes(4, "little"))
            h.update(np.ascontiguousarray(sequence).tobytes())
        return h.hexdigest()


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Negative log-likelihoods of one state on one set. nll: float64 [N]; sequence: int [N]."""

    nll: Array
    sequence: Array


@dataclass(frozen=True, slots=True)
class Reference:
    """A state to compare with: per batch its hidden states [n, D] with the head that belongs to
    them, or None when not cacheable. The head shares its arrays with the state that was measured.
    """

    likelihood: Likelihood
    hidden: tuple[mx.array, ...] | None
    head: Logits | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Per token against one reference. kl: float64 [N] nats; agree: bool [N]."""

    kl: Array
    agree: Array


class Evaluator:
    """Measures states of one resident model. Caches what does not change with an edit."""

    def __init__(self, model: nn.Module, head: HeadTap | None, vocabulary: int | None) -> None:
        self._model: Any = model
        self._head = head
        self._vocabulary = vocabulary or 1 << 15
        self._references: dict[tuple[StateKey, str], Reference] = {}
        self._plain_head: bool | None = None if head is not None else False
        self._model_dtype = mx.float32

    def batches(self, data: EvalSet) -> list[Batch]:
        """Batches whose logits stay near LOGITS_BYTES."""
        tokens = max(64, LOGITS_BYTES // (4 * self._vocabulary))
        return batches(list(data.sequences), batch_tokens=tokens, max_batch=8)

    def reference(self, key: StateKey, data: EvalSet, ctx: Context = SILENT) -> Reference:
        """The live weights as a reference named `key`, from the cache if they were seen before."""
        cached = self._references.get((key, data.digest))
        if cached is not None:
            return cached
        made = self._measure(data, ctx, f"reading {data.name} with the reference")
        while len(self._references) >= CACHED_STATES:
            del self._references[next(iter(self._references))]
        self._references[key, data.digest] = made
        return made

    def has_reference(self, key: StateKey, data: EvalSet) -> bool:
        """Whether `reference` would come from the cache."""
        return (key, data.digest) in self._references

    def _measure(self, data: EvalSet, ctx: Context, label: str) -> Reference:
        """One pass: likelihoods and, where the head is plain, hidden states."""
        nll, sequence, hidden = [], [], []
        todo = self.batches(data)
        for number, batch in enumerate(todo):
            ctx.check()
            logits, states = self._forward(batch)
            losses, _ = _token_losses(logits, batch)
            keep = [losses]
            if states is not None:
                states = _half(states)
                keep.append(states)
                hidden.append(states)
            mx.eval(*keep)
            nll.append(np.array(losses, dtype=np.float64))
            sequence.append(_sequences(batch))
            ctx.progress(label, number + 1, len(todo), "batches")
        likelihood = Likelihood(np.concatenate(nll), np.concatenate(sequence))
        if not self._plain_head or self._head is None:
            return Reference(likelihood, None)
        return Reference(likelihood, tuple(hidden), self._head.frozen())

    def compare(
        self,
        data: EvalSet,
        references: Sequence[Reference],
        again: Sequence[Callable[[], AbstractContextManager[None]]],
        ctx: Context = SILENT,
    ) -> tuple[Likelihood, list[Comparison]]:
        """Measure the live weights against each reference in one pass.

        again: for references without cached hidden states, makes their weights live so that the
        batch can be run a second time.
        """
        nll, sequence = [], []
        kls: list[list[Array]] = [[] for _ in references]
        agrees: list[list[Array]] = [[] for _ in references]
        todo = self.batches(data)
        for number, batch in enumerate(todo):
            ctx.check()
            logits, _ = self._forward(batch)
            losses, logq = _token_losses(logits, batch)
            mx.eval(losses, logq)
            nll.append(np.array(losses, dtype=np.float64))
            sequence.append(_sequences(batch))
            for r, reference in enumerate(references):
                with again[r]() if reference.hidden is None else _nothing():
                    logp = self._log_probabilities(reference, number, batch)
                    kl = mx.sum(mx.exp(logp) * (logp - logq), axis=-1)
                    agree = mx.argmax(logp, axis=-1) == mx.argmax(logq, axis=-1)
                    mx.eval(kl, agree)
                kls[r].append(np.array(kl, dtype=np.float64))
                agrees[r].append(np.array(agree))
            ctx.progress(f"evaluating {data.name}", number + 1, len(todo), "batches")
        compared = [
            Comparison(np.maximum(np.concatenate(k), 0.0), np.concatenate(a))
            for k, a in zip(kls, agrees, strict=True)
        ]
        return Likelihood(np.concatenate(nll), np.concatenate(sequence)), compared

    def next_token(self, batch: Batch) -> mx.array:
        """Log-probabilities [B, V], float32, of what follows each row's last real token; lazy.

        The head runs on those tokens alone where it is plain.
        """
        tokens = mx.array(batch.tokens)
        rows, last = mx.arange(len(batch.rows)), mx.array(batch.mask.sum(axis=1) - 1)
        if self._plain_head is None:
            self._forward(batch)
        if self._head is None or not self._plain_head:
            return log_softmax(self._model(tokens)[rows, last])
        with self._head.watching():
            self._model(tokens)
            seen = self._head.seen
        if seen is None:
            raise RuntimeError("the forward did not reach the output head")
        return log_softmax(self._head.logits(seen[rows, last]))

    def _log_probabilities(self, reference: Reference, number: int, batch: Batch) -> mx.array:
        if reference.hidden is None or reference.head is None:
            logits, _ = self._forward(batch)
            return log_softmax(_predicting(logits, batch))
        hidden = reference.hidden[number]
        dtype = self._model_dtype
        return log_softmax(reference.head(hidden.astype(dtype)))

    def _forward(self, batch: Batch) -> tuple[mx.array, mx.array | None]:
        """Logits [B, T, V] and, where the head is plain, hidden states [n, D] that predict."""
        tokens = mx.array(batch.tokens)
        if self._head is None or self._plain_head is False:
            return self._model(tokens), None
        with self._head.watching():
            logits: mx.array = self._model(tokens)
            seen = self._head.seen
        if self._plain_head is None:
            self._plain_head = self._check_head(logits, seen)
        if seen is None or not self._plain_head:
            return logits, None
        self._model_dtype = seen.dtype
        return logits, _predicting(seen, batch)

    def _check_head(self, logits: mx.array, seen: mx.array | None) -> bool:
        """Whether the head's output is the logits, so that hidden states stand for them."""
        if seen is None or self._head is None or seen.shape[:-1] != logits.shape[:-1]:
            return False
        again = self._head.logits(seen)
        same = again.shape == logits.shape and mx.allclose(again, logits, rtol=1e-4, atol=1e-5)
        return bool(same.item()) if isinstance(same, mx.array) else False


@dataclass(slots=True)
class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _nothing() -> AbstractContextManager[None]:
    return _Nothing()


def _predicting(values: mx.array, batch: Batch) -> mx.array:
    """Rows [n, ...] of values [B, T, ...] at positions whose next token is real."""
    flat = values[:, :-1].reshape(-1, values.shape[-1])
    return flat[mx.array(_positions(batch))]


def _positions(batch: Batch) -> Array:
    """Flat indices into [B, T-1] of positions whose next token is real."""
    index: Array = np.nonzero(batch.mask[:, 1:].reshape(-1))[0].astype(np.uint32)
    return index


def _sequences(batch: Batch) -> Array:
    """Sequence number of each predicting position, in the order of `_positions`."""
    rows = np.array(batch.rows)[:, None]
    numbers: Array = np.broadcast_to(rows, batch.mask[:, 1:].shape)[batch.mask[:, 1:]]
    return numbers


def _token_losses(logits: mx.array, batch: Batch) -> tuple[mx.array, mx.array]:
    """Negative log-likelihoods [n] and log-probabilities [n, V] of the real next tokens."""
    logq = log_softmax(_predicting(logits, batch))
    targets = batch.tokens[:, 1:].reshape(-1)[_positions(batch)]
    chosen = mx.take_along_axis(logq, mx.array(targets)[:, None], axis=-1)
    return -chosen[:, 0], logq


def _half(hidden: mx.array) -> mx.array:
    fits = mx.max(mx.abs(hidden.astype(mx.float32))) < HALF_LIMIT
    return hidden.astype(mx.float16) if bool(fits.item()) else hidden


def perplexity(likelihood: Likelihood) -> tuple[float, tuple[float, float]]:
    """Perplexity and its 95 % confidence interval.

    Ratio estimator over sequences: with s_i the summed loss and n_i the tokens of sequence i,
    m = sum s / sum n and Var(m) = n/(n-1) * sum (s_i - m n_i)^2 / (sum n)^2. A single sequence
    falls back to the spread of its tokens.
    """
    nll = likelihood.nll
    if not nll.size:
        raise DatasetError("no tokens to evaluate: every sample is shorter than two tokens")
    mean = float(nll.mean())
    _, groups = np.unique(likelihood.sequence, return_inverse=True)
    counts = np.bincount(groups)
    units = len(counts)
    if units > 1:
        residual = np.bincount(groups, weights=nll) - mean * counts
        error = sqrt(units / (units - 1) * float((residual**2).sum())) / float(nll.size)
    else:
        error = float(nll.std()) / sqrt(nll.size)
    return exp(mean), (exp(mean - 1.96 * error), exp(mean + 1.96 * error))


def joined(parts: Sequence[Likelihood]) -> Likelihood:
    """Several sets as one, their sequences kept apart."""
    offset, sequences = 0, []
    for part in parts:
        sequences.append(part.sequence + offset)
        offset += int(part.sequence.max(initial=-1)) + 1
    return Likelihood(np.concatenate([p.nll for p in parts]), np.concatenate(sequences))


def kl_figures(parts: Sequence[Comparison]) -> dict[str, float]:
    """kl_mean, kl_p99 (nats) and top1_agreement over all tokens."""
    kl = np.concatenate([part.kl for part in parts])
    agree = np.concatenate([part.agree for part in parts])
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(agree.mean()),
    }


def identical(likelihood: Likelihood) -> Comparison:
    """What comparing a state with itself gives."""
    count = likelihood.nll.size
    return Comparison(np.zeros(count), np.ones(count, dtype=np.bool_))


def iterate_sets(sets: Sequence[EvalSet]) -> Iterator[EvalSet]:
    """The sets, each under a name of its own."""
    seen: dict[str, int] = {}
    for data in sets:
        seen[data.name] = seen.get(data.name, 0) + 1
        name = data.name if seen[data.name] == 1 else f"{data.name}#{seen[data.name]}"
        yield EvalSet(name, data.sequences)
