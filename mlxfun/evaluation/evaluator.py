"""Measures losses, KL and top-1 agreement of a state of the weights against others, token by token.

One forward of the evaluation set measures a state, in batches as large as memory allows; the output
head runs on chunks of a batch, so that the weights are read once for thousands of tokens whatever
the vocabulary. The states it is compared with contribute their post-norm hidden states, cached once
in float16, from which their own output head, as it was then, makes their logits again (error of the
mean KL below 2e-6): the head, or the embedding it is tied to, may have been edited since. What a
model does to the logits after the head (softcaps, scales) is done to these too. Models whose logits
cannot be made from what enters the head are compared by a second forward instead.

With p the reference's and q the subject's distribution at a token, KL = sum_v p (ln p - ln q), in
nats. Perplexity is exp of the mean negative log-likelihood over tokens; its 95 % interval treats
sequences, not tokens, as the independent units (ratio estimator, normal approximation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Batch, batches
from mlxfun.evaluation.after_head import AfterHead, after_head
from mlxfun.evaluation.positions import (
    as_half,
    by_row,
    from_host,
    predicting,
    sequence_numbers,
    targets_of,
    to_host,
    token_losses,
)
from mlxfun.hooks.elsewhere import Task, elsewhere_of
from mlxfun.hooks.forwards import Watch, arrived, carried_together, each_forward
from mlxfun.hooks.head import HeadTap, Logits
from mlxfun.hooks.pace import Paced
from mlxfun.hooks.replay import NotReplayable, Replay
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.device.batch_size import BatchSize, batch_size, each_batch
from mlxfun.model.distributions import log_softmax
from mlxfun.model.places import LayerStore

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Result = TypeVar("Result")

LOGITS_BYTES = 256 << 20
"""Target size of one batch's float32 logits."""

PASS = "hidden states"
CACHED_STATES = 6
CACHED_BYTES = 2 << 30
"""Of references that are kept, the newest excepted."""

StateKey = tuple[str, str]
"""(state of the weights, steering in force), as `Editor.key` names what is live."""

Live = Callable[[], AbstractContextManager[None]]
"""Makes a state live inside a block."""


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
    """A state to compare with: of each sequence its hidden states [T - 1, D] with the head that
    belongs to them, or None when not cacheable. The head shares its arrays with the state that was
    measured.
    """

    likelihood: Likelihood
    hidden: dict[int, mx.array] | None
    head: Logits | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return sum(array.nbytes for array in (self.hidden or {}).values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Per token against one reference. kl: float64 [N] nats; agree: bool [N]."""

    kl: Array
    agree: Array


class Evaluator:
    """Measures states of one resident model. Caches what does not change with an edit."""

    def __init__(self, model: nn.Module, head: HeadTap | None, anatomy: MoEMap) -> None:
        self._model = model
        self._head = head
        self._anatomy = anatomy
        self._vocabulary = anatomy.vocabulary or 1 << 15
        self._references: dict[tuple[StateKey, str], Reference] = {}
        self._arrived: dict[tuple[StateKey, str], Replay] = {}
        self._after_head: AfterHead | None = None
        self._model_dtype = mx.float32

    @cached_property
    def _paced(self) -> Paced:
        return Paced(self._model, self._anatomy)

    def batch_size(self) -> BatchSize:
        """Of forwards whose logits are made in chunks, or of which one is wanted a row."""
        return batch_size(self._model, self._anatomy)

    def batches(self, data: EvalSet) -> list[Batch]:
        """Batches of one forward each; where the head cannot be run by itself, small enough that
        their logits stay near LOGITS_BYTES."""
        if self._in_chunks:
            return self.batch_size().split(data.sequences)
        return batches(list(data.sequences), batch_tokens=self._chunk, max_batch=8)

    @property
    def _chunk(self) -> int:
        """Tokens whose logits make LOGITS_BYTES."""
        return max(64, LOGITS_BYTES // (4 * self._vocabulary))

    @property
    def _in_chunks(self) -> bool:
        """Whether logits can be made from hidden states alone; found out with a short forward."""
        if self._after_head is None:
            self._after_head = after_head(self._model, self._anatomy, self._head)
        return self._after_head != "unknown"

    def reference(self, key: StateKey, data: EvalSet, ctx: Context = SILENT) -> Reference:
        """The live weights as a reference named `key`, from the cache if they were seen before."""
        cached = self._references.get((key, data.digest))
        if cached is not None:
            return cached
        made = self._measure(data, ctx, f"reading {data.name} with the reference", key)
        kept = self._references
        while kept and (
            len(kept) >= CACHED_STATES
            or made.nbytes + sum(r.nbytes for r in kept.values()) > CACHED_BYTES
        ):
            del kept[next(iter(kept))]
        kept[key, data.digest] = made
        return made

    @contextmanager
    def reading_once(
        self, data: Sequence[EvalSet], sides: Mapping[StateKey, Live], ctx: Context = SILENT
    ) -> Iterator[None]:
        """Several states of a model on disk, measured inside the block, are read in one pass.

        sides: what makes each of them live. Of a model in memory, or one whose layers cannot be
        replayed, nothing is done ahead.
        """
        store = LayerStore.of(self._model)
        if (
            store is not None
            and store.verdict == ""
            and len(sides) * len(data) > 1
            and self._in_chunks
        ):
            run, names = self._model, [(key, one.digest) for key in sides for one in data]
            lanes = [(live, self.batches(one)) for live in sides.values() for one in data]
            with suppress(NotReplayable):  # then each is read by itself
                carried = carried_together(run, self._anatomy, lanes, ctx, "reading layers")
                self._arrived = dict(zip(names, carried, strict=True))
        try:
            yield
        finally:
            self._arrived = {}

    def has_reference(self, key: StateKey, data: EvalSet) -> bool:
        """Whether `reference` would come from the cache."""
        return (key, data.digest) in self._references

    def _measure(self, data: EvalSet, ctx: Context, label: str, key: StateKey) -> Reference:
        """One pass: likelihoods and, where logits can be made from them, hidden states."""
        nll, sequence = [], []
        hidden: dict[int, mx.array] = {}
        done = 0
        for batch, (states, losses) in self._each(data, self._losses, ctx, label, key):
            nll.append(losses)
            sequence.append(sequence_numbers(batch))
            if states is not None:
                hidden |= by_row(as_half(states), batch)
            done += len(batch.rows)
            ctx.progress(label, done, len(data.sequences), "samples")
        likelihood = Likelihood(np.concatenate(nll), np.concatenate(sequence))
        if not self._in_chunks or self._head is None:
            return Reference(likelihood, None)
        return Reference(likelihood, hidden, self._head.frozen())

    def _each(
        self,
        data: EvalSet,
        work: Callable[[Batch, mx.array | None], Result],
        ctx: Context,
        label: str,
        key: StateKey | None,
    ) -> Iterator[tuple[Batch, Result]]:
        """`work` on each batch and, where another process has run the layers, what enters the head
        [n, D]. Where `work` may run the model twice, as two states, batches are not carried through
        the layers together."""
        todo = self.batches(data)
        elsewhere = elsewhere_of(self._model) if self._in_chunks else None
        if elsewhere is not None:
            found = elsewhere.forwards(Task(label, PASS), todo, ctx)
            if found is not None:
                return ((batch, work(batch, from_host(states))) for batch, states in found)

        def here(batch: Batch) -> Result:
            return work(batch, None)

        there = self._arrived.get((key, data.digest)) if key is not None else None
        if there is not None:
            return arrived(there, todo, here, ctx)
        if not self._in_chunks:
            return each_batch(todo, here, ctx)
        model, anatomy = self._model, self._anatomy
        return each_forward(
            model, anatomy, todo, lambda batch: Watch(partial(here, batch)), ctx, Task(label)
        )

    def states(self, batch: Batch) -> Array:
        """What enters the head at a batch's predicting positions, [n, D], see `to_host`."""
        return to_host(predicting(self._hidden(mx.array(batch.tokens)), batch))

    def _losses(self, batch: Batch, known: mx.array | None) -> tuple[mx.array | None, Array]:
        """Hidden states [n, D], evaluated, and losses float64 [n] of a batch."""
        states, chunks = self._forward(batch, known)
        losses = []
        for rows, logits in chunks:
            loss, _ = token_losses(logits, targets_of(batch)[rows])
            mx.eval(loss)
            losses.append(np.array(loss, dtype=np.float64))
        return states, np.concatenate(losses)

    def compare(
        self,
        data: EvalSet,
        references: Sequence[Reference],
        again: Sequence[Live],
        ctx: Context = SILENT,
        key: StateKey | None = None,
    ) -> tuple[Likelihood, list[Comparison]]:
        """Measure the live weights, named by `key`, against each reference in one pass.

        again: for references without cached hidden states, makes their weights live so that the
        batch can be run a second time.
        """
        nll, sequence = [], []
        kls: list[list[Array]] = [[] for _ in references]
        agrees: list[list[Array]] = [[] for _ in references]
        done = 0

        def work(batch: Batch, states: mx.array | None) -> tuple[Array, list[Comparison]]:
            return self._compared(batch, self._forward(batch, states)[1], references, again)

        label = f"evaluating {data.name}"
        for batch, (losses, compared) in self._each(data, work, ctx, label, key):
            nll.append(losses)
            sequence.append(sequence_numbers(batch))
            for r, comparison in enumerate(compared):
                kls[r].append(comparison.kl)
                agrees[r].append(comparison.agree)
            done += len(batch.rows)
            ctx.progress(label, done, len(data.sequences), "samples")
        return Likelihood(np.concatenate(nll), np.concatenate(sequence)), [
            Comparison(np.maximum(np.concatenate(k), 0.0), np.concatenate(a))
            for k, a in zip(kls, agrees, strict=True)
        ]

    def _compared(
        self,
        batch: Batch,
        chunks: Iterator[tuple[slice, mx.array]],
        references: Sequence[Reference],
        again: Sequence[Live],
    ) -> tuple[Array, list[Comparison]]:
        """Losses float64 [n] of a batch, and the live weights against each reference there. chunks:
        the batch's logits, see `_forward`."""
        losses: list[Array] = []
        kls: list[list[Array]] = [[] for _ in references]
        agrees: list[list[Array]] = [[] for _ in references]
        for rows, logits in chunks:
            loss, logq = token_losses(logits, targets_of(batch)[rows])
            mx.eval(loss, logq)
            losses.append(np.array(loss, dtype=np.float64))
            for r, reference in enumerate(references):
                with again[r]() if reference.hidden is None else nullcontext():
                    logp = self._log_probabilities(reference, batch, rows)
                    kl = mx.sum(mx.exp(logp) * (logp - logq), axis=-1)
                    agree = mx.argmax(logp, axis=-1) == mx.argmax(logq, axis=-1)
                    mx.eval(kl, agree)
                kls[r].append(np.array(kl, dtype=np.float64))
                agrees[r].append(np.array(agree))
        return np.concatenate(losses), [
            Comparison(np.concatenate(k), np.concatenate(a))
            for k, a in zip(kls, agrees, strict=True)
        ]

    def next_tokens(self, todo: Sequence[Batch], ctx: Context = SILENT) -> Iterator[mx.array]:
        """`next_token` of each batch, evaluated."""

        def run(batch: Batch) -> mx.array:
            found = self.next_token(batch)
            mx.eval(found)
            return found

        def watch(batch: Batch) -> Watch[mx.array]:
            return Watch(partial(run, batch))

        # Without a label: hooks of a search may be attached, whose passes are alike but for them.
        for _, found in each_forward(self._model, self._anatomy, todo, watch, ctx, Task("")):
            yield found

    def next_token(self, batch: Batch) -> mx.array:
        """Log-probabilities [B, V], float32, of what follows each row's last real token; lazy.

        The head runs on those tokens alone where it can.
        """
        tokens = mx.array(batch.tokens)
        rows, last = mx.arange(len(batch.rows)), mx.array(batch.mask.sum(axis=1) - 1)
        if not self._in_chunks:
            return log_softmax(self._model(tokens)[rows, last])
        return log_softmax(self._logits(self._hidden(tokens)[rows, last]))

    def _log_probabilities(self, reference: Reference, batch: Batch, rows: slice) -> mx.array:
        """Of a reference [n, V] at a chunk of the batch's predicting positions."""
        if reference.hidden is None or reference.head is None:
            _, chunks = self._forward(batch)
            return log_softmax(next(chunks)[1])
        hidden = mx.concatenate([reference.hidden[row] for row in batch.rows])[rows]
        return log_softmax(self._logits(hidden.astype(self._model_dtype), reference.head))

    def _forward(
        self, batch: Batch, known: mx.array | None = None
    ) -> tuple[mx.array | None, Iterator[tuple[slice, mx.array]]]:
        """Of the positions that predict: hidden states [n, D], evaluated, and their logits in
        chunks. Where logits cannot be made from hidden states: None, and one chunk of all. known:
        the hidden states, where they were made already.
        """
        tokens = mx.array(batch.tokens)
        if not self._in_chunks:
            logits = predicting(self._model(tokens), batch)
            return None, iter([(slice(None), logits)])
        states = predicting(self._hidden(tokens), batch) if known is None else known
        mx.eval(states)
        self._model_dtype = states.dtype
        starts = range(0, max(states.shape[0], 1), self._chunk)
        parts = (slice(start, start + self._chunk) for start in starts)
        return states, ((part, self._logits(states[part])) for part in parts)

    def _hidden(self, tokens: mx.array) -> mx.array:
        """What enters the head, [B, T, D], lazy."""
        assert self._head is not None
        with self._head.watching(), self._paced.forwards():
            self._model(tokens)
            seen = self._head.seen
        if seen is None:
            raise RuntimeError("the forward did not reach the output head")
        return seen

    def _logits(self, hidden: mx.array, head: Logits | None = None) -> mx.array:
        """Logits [n, V] of hidden states [n, D] by the live head or another."""
        assert self._head is not None
        if self._after_head == "changed":
            return self._head.replayed(hidden, head)
        return (head or self._head.logits)(hidden)
