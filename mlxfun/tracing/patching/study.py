"""One pair of prompts under study: its metric, what is kept of the clean run, and the grid of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.errors import UsageError
from mlxfun.tracing.options import ComponentName, MetricName
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.patching.metrics import Measured, Metric, TokenLike, measured
from mlxfun.tracing.patching.result import Method, PatchResult
from mlxfun.tracing.patching.runs import Pair, clean_values, gap, last_logits, pairs_of
from mlxfun.tracing.patching.units import ACROSS, Unit, layers_of
from mlxfun.tracing.prompts import Prompt
from mlxfun.tracing.values import Saved

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Patching:
    """Options of patching. answers: (answer,) or (answer, other) of the metric, by default what the
    two runs say. layers: all by default. batch_tokens: of the runs that are made together."""

    answers: tuple[TokenLike, ...] = ()
    layers: Sequence[int] | None = None
    batch_tokens: int = BATCH_TOKENS
    ctx: Context = field(default=SILENT)


@dataclass(frozen=True, slots=True)
class Study:
    """See the module's text. clean, corrupted: the metric in both runs. kept: of the clean run."""

    parts: Parts
    pair: Pair
    component: ComponentName
    layers: tuple[int, ...]
    rule: Measured
    clean: float
    corrupted: float
    kept: dict[str, Saved]

    @property
    def labels(self) -> tuple[str, ...]:
        """Texts of the columns."""
        match ACROSS[self.component]:
            case "position":
                return tuple(self.parts.tokenizer.decode([i]) for i in self.pair.corrupted)
            case "expert":
                return tuple(str(e) for e in range(self.parts.map.experts.num_experts))
            case "head":
                return tuple(str(h) for h in range(max(map(self.heads, self.layers))))

    def heads(self, layer: int) -> int:
        """How many heads a layer's attention has."""
        return self.kept[f"layers.{layer}.attn.heads"].shape[1]

    def units(self) -> list[Unit]:
        """Every cell that there is, layer by layer."""
        columns = range(len(self.labels))
        return [u for layer in self.layers for c in columns if self._exists(u := Unit(layer, c))]

    def _exists(self, unit: Unit) -> bool:
        match ACROSS[self.component]:
            case "head":
                return unit.column < self.heads(unit.layer)
            case "expert":
                return unit.column in self.parts.experts(unit.layer).live
            case "position":
                return True

    def empty(self) -> Array:
        """Scores [layers, columns], nan so far."""
        return np.full((len(self.layers), len(self.labels)), np.nan)

    def put(self, scores: Array, unit: Unit, value: float) -> None:
        """Set the score of one cell."""
        scores[self.layers.index(unit.layer), unit.column] = value

    def shares(self, values: Array) -> Array:
        """Values of the metric as shares of the way from the corrupted to the clean run."""
        return (values - self.corrupted) / (self.clean - self.corrupted)

    def result(self, method: Method, scores: Array, receiver: str = "") -> PatchResult:
        """The result."""
        ids = self.rule.answer, self.rule.other
        answer, other = ("" if i is None else self.parts.tokenizer.decode([i]) for i in ids)
        return PatchResult(
            method=method,
            component=self.component,
            metric=self.rule.name,
            across=ACROSS[self.component],
            layers=self.layers,
            labels=self.labels,
            scores=scores,
            clean=self.clean,
            corrupted=self.corrupted,
            answer=answer,
            other=other,
            receiver=receiver,
        )


def studies(
    parts: Parts,
    prompts: tuple[Prompt | Sequence[Prompt], Prompt | Sequence[Prompt]],
    component: ComponentName,
    metric: MetricName | Metric,
    options: Patching,
) -> list[Study]:
    """A study of each pair of (clean, corrupted). Raises UsageError for pairs that cannot be."""
    layers = tuple(layers_of(parts, component, options.layers))
    pairs = pairs_of(parts, *prompts)
    if ACROSS[component] == "position" and len({len(pair.clean) for pair in pairs}) > 1:
        raise UsageError(
            "pairs of different lengths have no common grid of positions; give pairs of one length"
        )
    return [_study(parts, pair, component, layers, (metric, options)) for pair in pairs]


def _study(
    parts: Parts,
    pair: Pair,
    component: ComponentName,
    layers: tuple[int, ...],
    how: tuple[MetricName | Metric, Patching],
) -> Study:
    metric, options = how
    ends = [last_logits(parts, tokens) for tokens in (pair.clean, pair.corrupted)]
    rule = measured(metric, parts.tokenizer, options.answers, *ends)
    clean, corrupted = gap(rule, *ends)
    kept = clean_values(parts, pair.clean, component, layers)
    return Study(parts, pair, component, layers, rule, clean, corrupted, kept)
