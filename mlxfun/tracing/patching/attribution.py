"""Attribution patching: the first-order estimate of activation patching, one gradient for all cells.

    score = (a_clean - a_corrupted) . d metric / d a, at the corrupted run, by the metric's gap

N. Nanda, Attribution patching, 2023; A. Syed et al., 2023. The gradient goes through packed weights:
MLX differentiates quantised products in their input. It is taken by adding a zero to each value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import ModelError
from mlxfun.tracing.axes import Axes, Span
from mlxfun.tracing.names import Point
from mlxfun.tracing.options import ComponentName, MetricName
from mlxfun.tracing.patching.metrics import Metric
from mlxfun.tracing.patching.result import PatchResult, averaged
from mlxfun.tracing.patching.runs import clean_values, patches, position_axis
from mlxfun.tracing.patching.study import Patching, Study, studies
from mlxfun.tracing.patching.units import SavedRoutes, Unit, experts_point, points_of
from mlxfun.tracing.prompts import Prompt, padded
from mlxfun.tracing.run import Run
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer


def attribution_patching(
    model: Tracer,
    clean: Prompt | Sequence[Prompt],
    corrupted: Prompt | Sequence[Prompt],
    component: ComponentName = "residual",
    metric: MetricName | Metric = "logit_diff",
    options: Patching = Patching(),  # noqa: B008 - frozen
) -> PatchResult:
    """What `activation_patching` would give, estimated by one gradient: see the module's text.

    Good for many cells and small differences, not where a patch saturates. Raises ModelError for a
    model through which MLX has no gradient.
    """
    found = studies(model.parts, (clean, corrupted), component, metric, options)
    return averaged([_estimated(study, options) for study in found])


@dataclass(frozen=True, slots=True)
class Added:
    """Adds an array to a value: the variable of the gradient, zero."""

    array: mx.array

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """value + array."""
        return value + self.array.astype(value.dtype)

    def on_experts(self, value: mx.array, choice: mx.array) -> mx.array:
        """Added to the sum over the experts, through their first place. array: [B, T, D]."""
        first = mx.arange(value.shape[2])[None, None, :, None] == 0
        return value + mx.where(first, self.array[:, :, None], 0).astype(value.dtype)


def gradients(study: Study, points: Sequence[Point], shapes: Sequence[Any]) -> list[mx.array]:
    """d metric / d value of each point at the corrupted run, float32, evaluated.

    shapes: of the zeros that are added. Raises ModelError where MLX has no gradient.
    """
    batch = padded([study.pair.corrupted])

    def measured(zeros: list[mx.array]) -> mx.array:
        edits = [(p, Added(zero)) for p, zero in zip(points, zeros, strict=True)]
        with Run(study.parts, edits, [], batch) as run:
            logits = study.parts.forward(mx.array(batch.tokens))[:, -1]
        run.require_reached()
        value: mx.array = study.rule.metric(logits.astype(mx.float32))[0]
        return value

    try:
        found: list[mx.array] = mx.grad(measured)([mx.zeros(s, mx.float32) for s in shapes])
        mx.eval(found)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"MLX has no gradient through {study.parts.map.model_type} ({error}); use "
            "activation patching"
        ) from error
    return found


def _estimated(study: Study, options: Patching) -> PatchResult:
    options.ctx.check()
    scores = study.empty()
    if study.component in ("expert", "route"):
        _of_experts(study, scores, options)
    else:
        _of_values(study, scores)
    return study.result("attribution patching", scores / (study.clean - study.corrupted))


def _of_values(study: Study, scores: Array) -> None:
    corrupted = clean_values(study.parts, study.pair.corrupted, study.component, study.layers)
    points = [points_of(study.parts, study.component, layer)[0] for layer in study.layers]
    slopes = gradients(study, points, [corrupted[p.name].shape for p in points])
    for row, (point, slope) in enumerate(zip(points, slopes, strict=True)):
        change = study.kept[point.name].value - corrupted[point.name].value
        product = np.array(change.astype(mx.float32) * slope)
        axis = 1 if study.component == "head" else position_axis(study.parts, point)
        total = product.sum(axis=tuple(a for a in range(product.ndim) if a != axis))
        scores[row, : len(total)] = total


def _of_experts(study: Study, scores: Array, options: Patching) -> None:
    """Experts and routes change the sum over the experts; its gradient is that of each part."""
    points = [experts_point(study.parts, layer) for layer in study.layers]
    plain = {p.name: SavedRoutes(p) for p in points}
    run_once(study.parts, padded([study.pair.corrupted]), [], list(plain.values()))
    shapes = [(1, *plain[p.name].value.shape[1:2], plain[p.name].value.shape[-1]) for p in points]
    slopes = gradients(study, points, shapes)
    for layer, point, slope in zip(study.layers, points, slopes, strict=True):
        options.ctx.check()
        here, units = plain[point.name], [u for u in study.units() if u.layer == layer]
        if study.component == "expert":
            kept = study.kept[point.name]
            assert isinstance(kept, SavedRoutes)
            ids = mx.array([unit.column for unit in units])
            change = kept.by_expert(ids) - here.by_expert(ids)
            values = mx.sum(change.astype(mx.float32) * slope, axis=(1, 2))
        else:
            values = mx.sum(_rerouted(study, here, units).astype(mx.float32) * slope[0], axis=1)
        for unit, value in zip(units, np.array(values).tolist(), strict=True):
            study.put(scores, unit, value)


def _rerouted(study: Study, here: SavedRoutes, units: Sequence[Unit]) -> mx.array:
    """What the clean run's route changes of a layer's sum in the corrupted run, [T, D]."""
    point = here.point
    saved = SavedRoutes(point)
    everywhere = patches(study.parts, "route", list(units), study.kept)
    # One row with the clean route at all positions: each position's sum depends on its own only.
    whole = [(p, _everywhere(patch)) for p, patch in everywhere]
    run_once(study.parts, padded([study.pair.corrupted]), whole, [saved])
    return mx.sum(saved.value[0] - here.value[0], axis=1)


def _everywhere(patch: Any) -> Any:
    return type(patch)(np.ones((1, patch.where.shape[1]), np.bool_), patch.clean, patch.heads)
