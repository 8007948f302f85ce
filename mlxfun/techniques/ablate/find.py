"""Finds ablation plans from two prompt sets: directions in one pass, then an optional search.

Each set is split once, by seed: a part gives the directions, a part judges the trials of a search,
and a part that neither has seen is left for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import DatasetError, PlanError, UsageError
from mlxfun.evaluation.refusal_metrics import (
    FIRST_TOKEN_ERROR,
    FirstToken,
    Panel,
    Prompts,
    ask_all,
)
from mlxfun.evaluation.reports import RefusalCount
from mlxfun.generation.answers import read_prompts
from mlxfun.hooks.replay import tell_reading
from mlxfun.model.components import Component
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.outputs import Output
from mlxfun.tally import Tally
from mlxfun.techniques.ablate import directions, search
from mlxfun.techniques.ablate.delta import Projector, projections
from mlxfun.techniques.ablate.directions import Directions
from mlxfun.techniques.ablate.options import POSITIONS, AblateOptions, Position, parse_strength
from mlxfun.techniques.ablate.plan import AblationPlan, Strengths
from mlxfun.techniques.ablate.reports import FrontPoint
from mlxfun.techniques.ablate.search import Point, Space, Trial

if TYPE_CHECKING:
    from mlxfun.data.datasets import Tokens
    from mlxfun.editing.editor import Editor
    from mlxfun.evaluation.evaluator import Evaluator

LEAST = 8
"""Prompts of each set without which a split means nothing."""

MOST_SELECT, MOST_CHECK = 64, 100
"""Prompts that judge the trials, and that are kept for the report, at most."""

FINALISTS = 3
"""Points of a front whose answers are decoded whole before one is chosen."""

ERROR_WORTH_TELLING = 0.02
"""Difference of KL, trial against staged, that is more than rounding."""


@dataclass(frozen=True, slots=True)
class Split:
    """One set of both kinds in three parts."""

    find: Prompts
    select: Prompts
    check: Prompts

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Harmful prompts in each part."""
        return tuple(len(part.harmful) for part in (self.find, self.select, self.check))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Model:
    """What a direction is looked for in. outputs: of the whole model, see mlxfun.model.outputs.

    layers: {number: path} of the decoder layers. experts: {decoder layer: experts that may be
    edited}, None for all. components: that may be.
    """

    tokenizer: Tokenizer
    editor: Editor
    evaluator: Evaluator
    outputs: tuple[Output, ...]
    components: tuple[Component, ...]
    layers: dict[int, str]
    experts: dict[int, tuple[int, ...]] | None = None

    @property
    def network(self) -> Any:
        """The model itself."""
        return self.editor.resident.tree.modules[""]


@dataclass(frozen=True, slots=True)
class Found:
    """Directions with the plans that came of them. state: of the weights they were found on.

    plans: of the front, gentlest first; one without a search. chosen: number of the best plan.
    judge: judges the live weights on the selecting prompts, None without a search. base: answers
    of those weights to the checking prompts, of at most `answer_tokens`, once they were asked.
    """

    state: str
    split: Split
    plans: tuple[AblationPlan, ...]
    chosen: int
    warnings: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    judged: str = ""
    per_minute: float = 0.0
    judge: FirstToken | None = field(default=None, repr=False)
    answer_tokens: int = 32
    base: Panel | None = field(default=None, repr=False)


# -- prompts ----------------------------------------------------------------------------------


def read_split(
    options: AblateOptions, tokenizer: Tokenizer, vocabulary: int | None, tally: Tally
) -> tuple[Split, list[str]]:
    """Both sets, split, and warnings. Raises UsageError, DatasetError."""
    if options.harmful is None or options.harmless is None:
        raise UsageError(
            "say which prompts are refused and which are not: --harmful and --harmless, for "
            "instance demo:harmful and demo:harmless"
        )
    parts: list[tuple[list[Tokens], ...]] = []
    warnings = []
    for data in (options.harmful, options.harmless):
        prompts, skipped = read_prompts(data, tokenizer, vocabulary, tally)
        if skipped:
            warnings.append(
                f"{skipped} prompts of {data.source} are longer than {data.max_tokens} tokens and "
                "were left out"
            )
        if len(prompts) < LEAST:
            raise DatasetError(
                f"{data.source} has {len(prompts)} prompts; at least {LEAST} are needed, since "
                "some find the direction and others check it"
            )
        where = thirds(len(prompts), bool(options.search), options.seed)
        parts.append(tuple([prompts[i] for i in part] for part in where))
    harmful, harmless = parts
    return Split(
        *(Prompts(tuple(a), tuple(b)) for a, b in zip(harmful, harmless, strict=True))
    ), warnings


def thirds(n: int, searching: bool, seed: int) -> tuple[tuple[int, ...], ...]:
    """Indices into n prompts that find, select and check, disjoint, ascending.

    >>> [len(part) for part in thirds(40, True, 0)], [len(part) for part in thirds(40, False, 0)]
    ([20, 10, 10], [30, 0, 10])
    """
    order = np.random.default_rng(seed).permutation(n)
    check = min(max(1, n // 4), MOST_CHECK)
    select = min(max(1, n // 4), MOST_SELECT) if searching else 0
    cuts = np.split(order, [n - select - check, n - check])
    return tuple(tuple(int(i) for i in np.sort(part)) for part in cuts)


# -- finding ----------------------------------------------------------------------------------


class Finder:
    """Finds plans on the live weights, which must be the committed ones, without steering."""

    def __init__(self, model: Model, options: AblateOptions, ctx: Context = SILENT) -> None:
        self._model, self._options, self._ctx = model, options, ctx
        self._count = len(model.layers)
        self._sources = directions.candidates(options.layers, self._count)
        self._warnings: list[str] = []

    def run(self, split: Split, warnings: Sequence[str]) -> Found:
        """Directions, and the plan or the front of plans. Raises PlanError, Cancelled."""
        self._warnings = list(warnings)
        found = self._directions(split.find)
        if self._options.search:
            return replace(self._search(split, found), answer_tokens=self._options.answer_tokens)
        position: Position = self._options.extraction_position or "last"
        source = directions.strongest(found, position, self._sources)
        strengths = spread_strength(
            self._options.strength, self._model.components, tuple(self._model.layers)
        )
        plan = self._plan(found, (source, position), strengths)
        if not plan.layers:
            raise PlanError(
                f"--strength {self._options.strength} leaves every part of --target "
                f"{self._options.target} as it is; give some part a strength above 0"
            )
        return Found(
            self._model.editor.state,
            split,
            (plan,),
            0,
            tuple(self._warnings),
            answer_tokens=self._options.answer_tokens,
        )

    def _directions(self, prompts: Prompts) -> Directions:
        modules = self._model.editor.resident.tree.modules
        layers = [modules[path] for path in self._model.layers.values()]
        size = batch_size(self._model.network, self._model.editor.resident.anatomy)
        sets = [size.split(part) for part in (prompts.harmful, prompts.harmless)]
        anatomy = self._model.editor.resident.anatomy
        means = directions.means_of_sets(self._model.network, anatomy, layers, sets, self._ctx)
        return directions.difference(*means)

    def _plan(
        self, found: Directions, where: tuple[int, Position], strengths: Strengths
    ) -> AblationPlan:
        source, position = where
        editor = self._model.editor
        anatomy = editor.resident.anatomy
        return AblationPlan(
            direction=tuple(float(v) for v in found.unit(position, source)),
            source_layer=source,
            position=position,
            strengths=strengths,
            norms=found.norms(position),
            keep=dict(zip(anatomy.indices, editor.committed, strict=True)),
            target=self._options.target,
            experts=self._model.experts,
            strategy=f"layer {source}, {position}",
        )

    # -- searching ----------------------------------------------------------------------------

    def _search(self, split: Split, found: Directions) -> Found:
        options, model, ctx = self._options, self._model, self._ctx
        panel = ask_all(
            model.network, model.tokenizer, split.select, options.answer_tokens, ctx, "before"
        )
        if not panel.count.harmful:
            raise PlanError(
                f"the model refuses none of {len(split.select.harmful)} harmful prompts, so there "
                "is nothing to search for; give prompts that it refuses"
            )
        tell_reading(model.network, ctx, options.search)
        first = FirstToken(model.evaluator, panel, ctx)
        by_answers = first.error > FIRST_TOKEN_ERROR
        space = self._space(found)
        resident = model.editor.resident
        projector = Projector(resident, model.outputs)
        began = monotonic()
        tried = 0

        def judge(point: Point) -> Trial:
            nonlocal tried
            ctx.check()
            projector.set(projections(model.outputs, self._point(found, space, point), resident))
            trial = self._judge(point, first, split.select if by_answers else None)
            tried += 1
            ctx.progress("searching", tried, options.search, "trials")
            return trial

        with projector.attached():
            trials = search.search(space, judge, options.search, options.max_kl, options.seed)
            minutes = (monotonic() - began) / 60
            front = search.front(trials)
            points, best = self._finals(front, found, space, projector, panel)
        plans = tuple(self._point(found, space, trial.point) for trial in front)
        return Found(
            model.editor.state,
            split,
            plans,
            best,
            tuple(self._warnings),
            trials,
            points,
            "answers" if by_answers else "first-token",
            len(trials) / max(minutes, 1e-9),
            first,
        )

    def _space(self, found: Directions) -> Space:
        asked = self._options.extraction_position
        positions = POSITIONS if asked is None else (asked,)
        ranked = sorted(self._sources, key=lambda i: -found.norm(positions[0], i))
        usable = tuple(i for i in ranked if all(found.norm(p, i) > 0 for p in positions))
        if not usable:
            raise PlanError(
                "harmful and harmless prompts do not differ behind any layer of "
                f"--layers {self._options.layers}; choose other layers or other prompts"
            )
        return Space(self._count, usable, positions, self._model.components)

    def _point(self, found: Directions, space: Space, point: Point) -> AblationPlan:
        plan = self._plan(found, (point.source, point.position), point.spread(space))
        return replace(plan, metric="refusals")

    def _judge(self, point: Point, first: FirstToken, whole: Prompts | None) -> Trial:
        """By first tokens, or by whole answers to the harmful prompts where `whole` is given."""
        if whole is None:
            return Trial(point, *first.judge(self._ctx))
        kl, false = first.harmless(self._ctx)
        only = Prompts(whole.harmful, ())
        asked = ask_all(
            self._model.network,
            self._model.tokenizer,
            only,
            self._options.answer_tokens,
            self._ctx,
            "trial",
        ).count
        return Trial(point, asked.harmful / asked.of_harmful, kl, false)

    def _finals(
        self,
        front: Sequence[Trial],
        found: Directions,
        space: Space,
        projector: Projector,
        panel: Panel,
    ) -> tuple[tuple[FrontPoint, ...], int]:
        """The front with answers counted for its best points, and which of them is chosen."""
        options, model = self._options, self._model
        if not front:
            raise PlanError(
                f"none of {options.search} trials stays below a KL of {search.DAMAGE:g}, "
                "where a model is damaged; try --layers with earlier layers, or more trials"
            )
        allowed = [i for i, trial in enumerate(front) if trial.kl <= options.max_kl]
        if not allowed:
            self._warnings.append(
                f"no trial keeps the first-token KL within --max-kl {options.max_kl:g}; the "
                "gentlest one was taken"
            )
        ranked = sorted(allowed or [0], key=lambda i: front[i].cost(options.max_kl))[:FINALISTS]
        counts: dict[int, RefusalCount] = {}
        for number in ranked:
            plan = self._point(found, space, front[number].point)
            projector.set(projections(model.outputs, plan, model.editor.resident))
            counts[number] = ask_all(
                model.network,
                model.tokenizer,
                panel.prompts,
                options.answer_tokens,
                self._ctx,
                f"finalist {len(counts) + 1} of {len(ranked)}",
            ).count
        already = panel.count.harmless

        def badness(number: int) -> tuple[int, float]:
            count = counts[number]
            return count.harmful + max(0, count.harmless - already), front[number].kl

        points = tuple(
            _front_point(number, trial, space, counts.get(number))
            for number, trial in enumerate(front)
        )
        return points, min(counts, key=badness)


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
    )


def spread_strength(text: str, components: Sequence[Component], layers: Sequence[int]) -> Strengths:
    """{component: {decoder layer: strength}} of `--strength`; what no term names is 0.

    Raises UsageError for a component or layers that the model or the target does not have.
    """
    found = {part: dict.fromkeys(layers, 0.0) for part in components}
    for term in parse_strength(text):
        if term.component is not None and term.component not in found:
            raise UsageError(
                f"--strength {text!r}: this model, with this target, has no {term.component} to "
                f"edit; it has {', '.join(components)}"
            )
        low, high = term.layers or (layers[0], layers[-1])
        if high not in layers:
            raise UsageError(
                f"--strength {text!r}: the decoder layers of this model are "
                f"{layers[0]}..{layers[-1]}"
            )
        for part in found if term.component is None else (term.component,):
            found[part] |= {i: term.value for i in layers if low <= i <= high}
    return found
