"""Activation patching (causal tracing): a component of the clean run in the corrupted one.

    score = (metric(patched) - metric(corrupted)) / (metric(clean) - metric(corrupted))

K. Meng et al., Locating and editing factual associations in GPT, 2022; K. Wang et al.,
Interpretability in the wild, 2022. An expert is patched by what it adds, and by nothing where the
clean run did not choose it; a route is patched by choice and weights, the experts seeing the
corrupted run's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxfun.tracing.options import ComponentName, MetricName
from mlxfun.tracing.patching.metrics import Metric
from mlxfun.tracing.patching.result import PatchResult, averaged
from mlxfun.tracing.patching.runs import patched_metric, patches
from mlxfun.tracing.patching.study import Patching, Study, studies
from mlxfun.tracing.prompts import Prompt
from mlxfun.tracing.tracer import Tracer


def activation_patching(
    model: Tracer,
    clean: Prompt | Sequence[Prompt],
    corrupted: Prompt | Sequence[Prompt],
    component: ComponentName = "residual",
    metric: MetricName | Metric = "logit_diff",
    options: Patching = Patching(),  # noqa: B008 - frozen
) -> PatchResult:
    """How far each component of the clean run brings the corrupted one back to it.

    component: residual, attn, mlp, route (layers x positions), head (layers x heads) or expert
    (layers x experts). metric: see metrics, or an own function of logits [B, V]. Several pairs are
    averaged. Raises UsageError for prompts of unequal length, and where nothing is to restore.
    """
    found = studies(model.parts, (clean, corrupted), component, metric, options)
    return averaged([_patched(study, options) for study in found])


def _patched(study: Study, options: Patching) -> PatchResult:
    scores = study.empty()
    rows = max(1, options.batch_tokens // len(study.pair.clean))
    units = study.units()
    for start in range(0, len(units), rows):
        options.ctx.check()
        some = units[start : start + rows]
        edits = patches(study.parts, study.component, some, study.kept)
        values = patched_metric(study.parts, study.pair.corrupted, edits, len(some), study.rule)
        for unit, value in zip(some, np.array(values).tolist(), strict=True):
            study.put(scores, unit, value)
        options.ctx.progress("patched runs", start + len(some), len(units), "runs")
    return study.result("activation patching", study.shares(scores))
