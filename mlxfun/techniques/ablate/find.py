"""Finds ablation plans from two prompt sets: directions in one pass, then an optional search
(mlxfun.techniques.ablate.searching).

Each set is split once, by seed: a part gives the directions, a part judges the trials of a search,
and a part that neither has seen is left for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import DatasetError, PlanError, UsageError
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.refusal_metrics import (
    FirstToken,
    Panel,
    Prompts,
)
from mlxfun.generation.answers import read_prompts
from mlxfun.model.components import Component
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.outputs import Output
from mlxfun.tally import Tally
from mlxfun.techniques.ablate import directions
from mlxfun.techniques.ablate.oblique import Texts, erasers
from mlxfun.techniques.ablate.options import POSITIONS, AblateOptions, Position, parse_strength
from mlxfun.techniques.ablate.plan import AblationPlan, Strengths
from mlxfun.techniques.ablate.reports import FrontPoint
from mlxfun.techniques.ablate.search import OWN, Space, Trial
from mlxfun.text import counted

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
class Text:
    """Plain text, int32 [T] each. fit: that an oblique projection is fitted to leave as it is.
    judge: that trials are judged on, None for answers to harmless prompts.
    """

    fit: tuple[Tokens, ...] = ()
    judge: EvalSet | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a direction is looked for in. outputs: of the whole model, see mlxfun.model.outputs.

    layers: {number: path} of the decoder layers. parts: {path of an output: path of the part that it
    is a summand of}. experts: {decoder layer: experts that may be edited}, None for all.
    components: that may be. text: plain text to leave as it is. width: D, of the residual stream.
    """

    tokenizer: Tokenizer
    text: Text
    editor: Editor
    evaluator: Evaluator
    outputs: tuple[Output, ...]
    components: tuple[Component, ...]
    layers: dict[int, str]
    parts: dict[str, str]
    width: int
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
    answer_tokens: int = 100
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
    bodies: list[set[bytes]] = []
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
                f"{counted(len(prompts), 'prompt', 'prompts')} of {data.source} can be used, at least "
                f"{LEAST} are needed, since some find the direction and others check it; give a "
                "larger set, or raise --max-samples or --max-tokens"
            )
        where = thirds(len(prompts), bool(options.search), options.seed)
        parts.append(tuple([prompts[i] for i in part] for part in where))
        bodies.append({prompt.tobytes() for prompt in prompts})
    if both := len(bodies[0] & bodies[1]):
        warnings.append(
            f"{counted(both, 'prompt is', 'prompts are')} in {options.harmful.source} and in "
            f"{options.harmless.source}: the direction cannot tell them apart"
        )
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


class Source(Protocol):
    """Where plans come from."""

    def plan(self, where: tuple[int, Position], strengths: Strengths) -> AblationPlan:
        """The plan that removes what is found at (layer, position) with some strengths."""

    def space(self) -> Space:
        """What a search may choose. Raises PlanError where there is nothing to remove."""

    def best(self) -> tuple[int, Position]:
        """Where to take it without a search."""


class Orthogonal:
    """One direction of the residual stream, taken behind a layer."""

    def __init__(
        self, model: Model, options: AblateOptions, prompts: Prompts, ctx: Context
    ) -> None:
        self._model, self._options = model, options
        self._layers = directions.candidates(options.layers, len(model.layers))
        modules = model.editor.resident.tree.modules
        anatomy = model.editor.resident.anatomy
        size = batch_size(model.network, anatomy)
        sets = [size.split(part) for part in (prompts.harmful, prompts.harmless)]
        layers = [modules[path] for path in model.layers.values()]
        means = directions.means_of_sets(model.network, anatomy, layers, sets, ctx)
        self._found = directions.difference(*means)

    def best(self) -> tuple[int, Position]:
        """See Source."""
        position: Position = self._options.extraction_position or "last"
        return directions.strongest(self._found, position, self._layers), position

    def space(self) -> Space:
        """See Source."""
        asked, found = self._options.extraction_position, self._found
        positions = POSITIONS if asked is None else (asked,)
        ranked = sorted(self._layers, key=lambda i: -found.norm(positions[0], i))
        usable = tuple(i for i in ranked if all(found.norm(p, i) > 0 for p in positions))
        if not usable:
            raise PlanError(
                "harmful and harmless prompts do not differ behind any layer of "
                f"--layers {self._options.layers}; choose other layers or other prompts"
            )
        return Space(len(self._model.layers), usable, positions, self._model.components)

    def plan(self, where: tuple[int, Position], strengths: Strengths) -> AblationPlan:
        """See Source."""
        source, position = where
        return AblationPlan(
            direction=tuple(float(v) for v in self._found.unit(position, source)),
            source_layer=source,
            position=position,
            strengths=strengths,
            norms=self._found.norms(position),
            keep=_kept(self._model),
            target=self._options.target,
            experts=self._model.experts,
            strategy=f"layer {source}, {position}",
        )


class Oblique:
    """Each part's own difference (mlxfun.techniques.ablate.oblique)."""

    def __init__(
        self, model: Model, options: AblateOptions, prompts: Prompts, ctx: Context
    ) -> None:
        self._model, self._options = model, options
        resident = model.editor.resident
        texts = Texts(prompts.harmful, prompts.harmless, model.text.fit, options.directions)
        parts = list(dict.fromkeys(model.parts[output.path] for output in model.outputs))
        found = erasers(model.network, resident.anatomy, parts, model.width, texts, ctx)
        self._erasers = {
            output.path: found[model.parts[output.path]]
            for output in model.outputs
            if model.parts[output.path] in found
        }
        squares: dict[int, dict[str, float]] = {}
        for output in model.outputs:
            part = model.parts[output.path]
            if part in found:
                each = squares.setdefault(output.layer, {})
                each[part] = float(np.square(found[part].write).sum())
        self._norms = {i: float(np.sqrt(sum(squares.get(i, {}).values()))) for i in model.layers}

    def best(self) -> tuple[int, Position]:
        """See Source."""
        return OWN, "last"

    def space(self) -> Space:
        """See Source."""
        model = self._model
        return Space(len(model.layers), (OWN,), ("last",), model.components)

    def plan(self, where: tuple[int, Position], strengths: Strengths) -> AblationPlan:
        """See Source."""
        return AblationPlan(
            direction=(),
            source_layer=max(self._norms, key=lambda i: self._norms[i]),
            position="last",
            strengths=strengths,
            norms=self._norms,
            keep=_kept(self._model),
            target=self._options.target,
            experts=self._model.experts,
            strategy="each part's own difference",
            erasers=self._erasers,
        )


def _kept(model: Model) -> dict[int, tuple[int, ...]]:
    editor = model.editor
    return dict(zip(editor.resident.anatomy.indices, editor.committed, strict=True))


def find(
    model: Model,
    options: AblateOptions,
    split: Split,
    warnings: Sequence[str],
    ctx: Context = SILENT,
) -> tuple[Source, Found]:
    """What is to go from the live weights, which must be the committed ones, without steering; and
    the plan that removes it, as it is without a search. Raises PlanError, Cancelled.
    """
    source: Source
    if options.projection == "oblique":
        source = Oblique(model, options, split.find, ctx)
    else:
        source = Orthogonal(model, options, split.find, ctx)
    layers = tuple(model.layers)
    strengths = spread_strength(options.strength, model.components, layers)
    plan = source.plan(source.best(), strengths)
    if not plan.layers:
        raise PlanError(
            f"--strength {options.strength} leaves every part of --target "
            f"{options.target} as it is; give some part a strength above 0"
        )
    return source, Found(
        model.editor.state,
        split,
        (plan,),
        0,
        tuple(warnings),
        answer_tokens=options.answer_tokens,
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
