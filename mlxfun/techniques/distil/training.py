"""The training loop: Adam on a warmed-up cosine schedule, judged on held-out text now and then.

What is judged are the weights as they would be staged, rounded and packed. The best of them are
what comes out, also where training stopped early or was cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

from mlxfun.context import SILENT, Context, Quietly
from mlxfun.data.datasets import batches
from mlxfun.errors import BudgetError, Cancelled, PlanError
from mlxfun.evaluation.evaluator import EvalSet, Likelihood, Live, Reference
from mlxfun.evaluation.figures import perplexity
from mlxfun.events import Notice
from mlxfun.model.delta import Delta
from mlxfun.model.device.memory import is_out_of_memory
from mlxfun.techniques.distil.options import RATE, DistilOptions
from mlxfun.techniques.distil.reports import Measured
from mlxfun.techniques.distil.student import Student
from mlxfun.techniques.distil.variables import Masters, Variable, trained_delta
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch

MOST_STEPS = 25
"""Steps between two judgements, at most; there are two in a pass at least."""

PATIENCE = 4
"""Judgements in a row that were no better, after which training stops."""

WARM_UP = 20
"""The rate rises over one of so many steps."""

End = Literal["done", "early", "cancelled"]


@dataclass(frozen=True, slots=True)
class Text:
    """A text with what the checkpoint makes of it. again: makes the checkpoint live."""

    data: EvalSet
    teacher: Reference
    again: Live

    def part(self, count: int) -> Text:
        """About `count` of its samples, evenly spread."""
        sequences = self.data.sequences
        if count >= len(sequences):
            return self
        picked = np.unique(np.linspace(0, len(sequences) - 1, count).round().astype(int))
        hidden = self.teacher.hidden
        assert hidden is not None
        some = {new: hidden[int(old)] for new, old in enumerate(picked)}
        chosen = tuple(sequences[int(i)] for i in picked)
        known = self.teacher.likelihood
        there = np.isin(known.sequence, picked)
        likelihood = Likelihood(known.nll[there], known.sequence[there])
        teacher = Reference(likelihood, some, self.teacher.head)
        return Text(EvalSet(self.data.name, chosen), teacher, self.again)

    def judged(self, workspace: Workspace, delta: Delta, ctx: Context = SILENT) -> Measured:
        """The live weights with `delta` against the checkpoint."""
        with workspace.resident.trial(delta):
            likelihood, (found,) = workspace.evaluator.compare(
                self.data, [self.teacher], [self.again], ctx
            )
        return Measured(float(found.kl.mean()), perplexity(likelihood)[0])


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out. steps: that were taken, of `planned`; best: after which the best were there.
    before, after: on held-out text."""

    masters: Masters
    before: Measured
    after: Measured
    steps: int
    planned: int
    best: int
    end: End


@dataclass(slots=True)
class Trainer:
    """One training run of the live weights."""

    workspace: Workspace
    student: Student
    wanted: Sequence[Variable]
    fitted: Text
    held_out: Text
    options: DistilOptions
    _batches: list[Batch] = field(init=False)
    _adam: Any = field(init=False)

    def __post_init__(self) -> None:
        sequences = list(self.fitted.data.sequences)
        size = self.options.step_of(sum(map(len, sequences)))
        self._batches = batches(sequences, size, max(len(sequences), 1))
        rate = self.options.rate or RATE
        self._adam = optimizers.Adam(self._schedule(rate), bias_correction=True)

    @property
    def planned(self) -> int:
        """Steps."""
        return self.options.passes * len(self._batches)

    @property
    def every(self) -> int:
        """Steps between two judgements."""
        return max(1, min(MOST_STEPS, len(self._batches) // 2))

    def _schedule(self, rate: float) -> Any:
        rising = max(1, self.planned // WARM_UP)
        falling = optimizers.cosine_decay(rate, max(1, self.planned - rising))
        rise = optimizers.linear_schedule(rate / (rising + 1), rate, rising)
        return optimizers.join_schedules([rise, falling], [rising])

    def run(self, masters: Masters, ctx: Context = SILENT) -> Trained:
        """Train, beginning with `masters`. Raises Cancelled where nothing better was found by then,
        PlanError where nothing was in all steps, and BudgetError for want of memory."""
        before = self.held_out.judged(self.workspace, Delta(()), Quietly(ctx))
        state = _State(masters, before)
        end: End = "done"
        try:
            for batch in self._order():
                self._step(state, batch, ctx)
                if state.worse >= PATIENCE:
                    end = "early"
                    break
        except Cancelled:
            if not state.best:
                raise
            end = "cancelled"
        if not state.best:
            raise PlanError(
                f"{state.steps} steps did not lower the KL on held-out text ({before.kl:.4f} nats); "
                "collect more text, or train with a smaller --rate"
            )
        return Trained(state.kept, before, state.found, state.steps, self.planned, state.best, end)

    def _order(self) -> list[Batch]:
        rng = np.random.default_rng(self.options.seed)
        count = len(self._batches)
        return [
            self._batches[i] for _ in range(self.options.passes) for i in rng.permutation(count)
        ]

    def _step(self, state: _State, batch: Batch, ctx: Context) -> None:
        ctx.check()
        try:
            self.descend(state, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BudgetError(
                f"a step of {batch.tokens.size:,} tokens does not fit in memory "
                f"({str(error)[:100]}); lower --step-tokens, or --max-tokens of the text"
            ) from error
        if state.steps % self.every == 0 or state.steps == self.planned:
            state.note(self._judged(state.masters, ctx))
            ctx.emit(Notice("info", state.said))
        ctx.progress("distilling", state.steps, self.planned, "steps")

    def descend(self, state: _State, batch: Batch) -> mx.array:
        """One step of Adam; the loss ahead of it."""
        loss, slope = self.student.gradient(state.masters, batch, self.fitted.teacher)
        new: Masters = self._adam.apply_gradients(slope, state.masters)
        mx.eval(loss, new, self._adam.state)
        state.masters, state.steps = new, state.steps + 1
        return loss

    def _judged(self, masters: Masters, ctx: Context) -> Measured:
        delta = trained_delta(self.workspace, self.wanted, masters)
        return self.held_out.judged(self.workspace, delta, Quietly(ctx))


@dataclass(slots=True)
class _State:
    """How far a run is. kept, found: the best masters, and what they were judged at, of step `best`,
    0 for what there was before."""

    masters: Masters
    found: Measured
    kept: Masters = field(default_factory=dict)
    steps: int = 0
    best: int = 0
    worse: int = 0
    start: float = field(init=False)
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.last = self.found.kl

    @property
    def said(self) -> str:
        """What the last judgement found."""
        best = f"best {self.found.kl:.4f} at step {self.best}" if self.best else "no better yet"
        return f"step {self.steps}: held-out KL {self.last:.4f} ({self.start:.4f} before, {best})"

    def note(self, found: Measured) -> None:
        """What the masters are judged at now."""
        self.last = found.kl
        if found.kl < self.found.kl:
            self.found, self.kept, self.best, self.worse = found, self.masters, self.steps, 0
        else:
            self.worse += 1
