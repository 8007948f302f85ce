"""Runs a search (mlxfun.techniques.ablate.search) on a model: what a trial is judged by, and which
points of the front are looked at closely.

A trial costs one forward of the selecting prompts and one of plain text, with the projection made on
activations: no weight is touched. Where first tokens do not tell a refusal, the answers to harmful
prompts are decoded. The best points of the front are judged by whole answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from time import monotonic

import numpy as np

from mlxfun.context import Context, Quietly
from mlxfun.errors import PlanError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator
from mlxfun.evaluation.refusal_metrics import FIRST_TOKEN_ERROR, FirstToken, Panel, Prompts, ask_all
from mlxfun.evaluation.reports import RefusalCount
from mlxfun.generation.answers import Greedy
from mlxfun.hooks.replay import tell_reading
from mlxfun.techniques.ablate import search
from mlxfun.techniques.ablate.delta import Projector, projections
from mlxfun.techniques.ablate.find import Found, Model, Source, Split
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.ablate.plan import AblationPlan
from mlxfun.techniques.ablate.reports import FrontPoint
from mlxfun.techniques.ablate.search import Bounds, Point, Space, Trial

FINALISTS = 3
"""Points of a front whose answers are decoded whole before one is chosen."""


class TextLoss:
    """What a token of plain text costs the live weights more than it did, in nats: the logarithm of
    the perplexity ratio.
    """

    def __init__(self, evaluator: Evaluator, data: EvalSet, ctx: Context) -> None:
        """The live weights are the ones to compare with."""
        self._evaluator, self._data = evaluator, data
        self._before = self._loss(ctx)

    def __call__(self, ctx: Context) -> float:
        return self._loss(ctx) - self._before

    def _loss(self, ctx: Context) -> float:
        likelihood, _ = self._evaluator.compare(self._data, [], [], Quietly(ctx))
        return float(likelihood.nll.mean())


def text_of(model: Model, panel: Panel) -> EvalSet:
    """What trials are judged on besides prompts: text kept back, or the model's answers."""
    if model.text.judge is not None:
        return model.text.judge
    pairs = zip(panel.prompts.harmless, panel.harmless, strict=True)
    whole = [np.concatenate([p, np.asarray(a.tokens, np.int32)]) for p, a in pairs]
    return EvalSet("harmless answers", tuple(whole))


@dataclass(frozen=True, slots=True)
class Search:
    """A search for what `source` removes. split: the prompts."""

    model: Model
    options: AblateOptions
    source: Source
    split: Split
    ctx: Context

    @property
    def bounds(self) -> Bounds:
        """What a point should stay within."""
        return Bounds(self.options.max_kl, log(self.options.max_perplexity))

    def run(self, found: Found) -> Found:
        """`found` with the front of plans, and the best of them. Raises PlanError, Cancelled."""
        options, model, ctx = self.options, self.model, self.ctx
        answering = Greedy(model.network, model.tokenizer)
        asked = self.split.select
        panel = ask_all(answering, asked, options.answer_tokens, ctx, "refusals before")
        if not panel.count.harmful:
            raise PlanError(
                f"the model refuses none of {len(self.split.select.harmful)} harmful prompts, so "
                "there is nothing to search for; give prompts that it refuses"
            )
        tell_reading(model.network, ctx, options.search)
        first = FirstToken(model.evaluator, panel, ctx)
        text = TextLoss(model.evaluator, text_of(model, panel), ctx)
        whole = self.split.select if first.error > FIRST_TOKEN_ERROR else None
        space = self.source.space()
        projector = Projector(model.editor.resident, model.outputs)
        began = monotonic()
        tried = 0

        def judge(point: Point) -> Trial:
            nonlocal tried
            ctx.check()
            self._project(projector, self._plan(space, point))
            trial = replace(self._judge(point, first, whole), text=text(ctx))
            tried += 1
            ctx.progress("searching", tried, options.search, "trials")
            return trial

        with projector.attached():
            trials = search.search(space, judge, options.search, self.bounds, options.seed)
            minutes = (monotonic() - began) / 60
            front = search.front(trials)
            points, best, notes = self._finals(front, space, projector, panel)
        return replace(
            found,
            plans=tuple(self._plan(space, trial.point) for trial in front),
            chosen=best,
            warnings=(*found.warnings, *notes),
            trials=trials,
            front=points,
            judged="answers" if whole is not None else "first-token",
            per_minute=len(trials) / max(minutes, 1e-9),
            judge=first,
        )

    def _plan(self, space: Space, point: Point) -> AblationPlan:
        plan = self.source.plan((point.source, point.position), point.spread(space))
        return replace(plan, metric="refusals")

    def _project(self, projector: Projector, plan: AblationPlan) -> None:
        model = self.model
        projector.set(projections(model.outputs, plan, model.editor.resident))

    def _judge(self, point: Point, first: FirstToken, whole: Prompts | None) -> Trial:
        """By first tokens, or by whole answers to the harmful prompts where `whole` is given."""
        if whole is None:
            return Trial(point, *first.judge(self.ctx))
        kl, false = first.harmless(self.ctx)
        asked = self._count(Prompts(whole.harmful, ()), "trial")
        return Trial(point, asked.harmful / asked.of_harmful, kl, false)

    def _count(self, prompts: Prompts, label: str) -> RefusalCount:
        answering = Greedy(self.model.network, self.model.tokenizer)
        return ask_all(answering, prompts, self.options.answer_tokens, self.ctx, label).count

    def _finals(
        self, front: Sequence[Trial], space: Space, projector: Projector, panel: Panel
    ) -> tuple[tuple[FrontPoint, ...], int, list[str]]:
        """The front with answers counted for its best points, which of them is chosen, and notes."""
        bounds, notes = self.bounds, []
        if not front:
            raise PlanError(
                f"none of {self.options.search} trials stays below a KL of {search.DAMAGE:g}, "
                "where a model is damaged; try more trials, or other prompts"
            )
        allowed = [i for i, trial in enumerate(front) if trial.within(bounds)]
        if not allowed:
            notes.append(
                f"no trial keeps the first-token KL within --max-kl {self.options.max_kl:g} and the "
                f"perplexity of text within --max-perplexity {self.options.max_perplexity:g}; the "
                "one that comes closest was taken"
            )
        ranked = sorted(allowed or range(len(front)), key=lambda i: front[i].cost(bounds))
        counts: dict[int, RefusalCount] = {}
        finalists = ranked[: FINALISTS if allowed else 1]
        for number in finalists:
            self._project(projector, self._plan(space, front[number].point))
            label = f"finalist {len(counts) + 1} of {len(finalists)}"
            counts[number] = self._count(panel.prompts, label)
        already = panel.count.harmless

        def badness(number: int) -> tuple[int, float]:
            count = counts[number]
            refused = count.harmful + max(0, count.harmless - already)
            return refused, front[number].cost(bounds)

        points = tuple(
            _front_point(number, trial, space, counts.get(number))
            for number, trial in enumerate(front)
        )
        return points, min(counts, key=badness), notes


def _front_point(number: int, trial: Trial, space: Space, count: RefusalCount | None) -> FrontPoint:
    spread = trial.point.spread(space)
    return FrontPoint(
        number=number,
        source_layer=trial.point.source,
        position=trial.point.position,
        strengths={part: max(each.values()) for part, each in spread.items()},
        expected=trial.refusals,
        kl=trial.kl,
        count=count,
        perplexity=float(np.exp(trial.text)),
    )
