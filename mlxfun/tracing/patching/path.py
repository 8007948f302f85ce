"""Path patching: what a sender of the clean run carries over by the direct path to a receiver alone.

1. The corrupted run is made with the sender's value of the clean run, while every other attention
   and feed-forward part keeps what it puts out in the corrupted run; the receiver's value is kept.
2. The corrupted run is made again with only that value in the receiver, and measured.

A receiver is the output, or a value such as `layers.5.attn.queries` or `layers.5.mlp.input`.
N. Goldowsky-Dill et al., Localizing model behavior with path patching, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxfun.errors import ModelError, UsageError
from mlxfun.model.anatomy import facts
from mlxfun.tracing.axes import Axes, Span
from mlxfun.tracing.names import Point
from mlxfun.tracing.options import ComponentName, MetricName
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.patching.metrics import Metric
from mlxfun.tracing.patching.result import PatchResult, averaged
from mlxfun.tracing.patching.runs import patched_metric, patches
from mlxfun.tracing.patching.study import Patching, Study, studies
from mlxfun.tracing.patching.units import Unit
from mlxfun.tracing.prompts import Prompt, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved

SENDERS: tuple[ComponentName, ...] = ("attn", "mlp", "head", "expert")


def path_patching(
    model: Tracer,
    prompts: tuple[Prompt | Sequence[Prompt], Prompt | Sequence[Prompt]],
    sender: ComponentName = "head",
    receiver: str = "output",
    metric: MetricName | Metric = "logit_diff",
    options: Patching = Patching(),  # noqa: B008 - frozen
) -> PatchResult:
    """The share of the metric that each sender restores by its direct path to `receiver`.

    prompts: (clean, corrupted). sender: attn, mlp, head or expert, of the layers ahead of the
    receiver. Raises UsageError for other senders and receivers, ModelError for a model that writes
    to the residual stream beside its attention and feed-forward parts.
    """
    if sender not in SENDERS:
        raise UsageError(f"{sender!r} sends by no path of its own; choose {', '.join(SENDERS)}")
    parts = model.parts
    point = parts.names.point(receiver)
    if point.kind in ("route", "expert"):
        raise UsageError(f"{receiver} is no receiver; name the input of a part, or output")
    if receiver == "output":
        last = parts.names.layers
    elif point.layer is None:
        raise UsageError(f"{receiver} is of no layer; name a part of a layer, or output")
    else:
        last = point.layer
    freezing = frozen_points(parts)
    # The parts of the receiver's own layer run ahead of it too: an attention writes to the MLP.
    ahead = [
        n for n in range(parts.names.layers) if n < last or _same_layer(sender, point, n, last)
    ]
    chosen = [n for n in ahead if options.layers is None or n in options.layers]
    options = Patching(options.answers, chosen, options.batch_tokens, options.ctx)
    found = studies(parts, prompts, sender, metric, options)
    return averaged([_along(study, point, freezing, options) for study in found])


def _same_layer(sender: ComponentName, point: Point, layer: int, last: int) -> bool:
    return layer == last and sender in ("attn", "head") and ".mlp" in point.name


def frozen_points(parts: Parts) -> list[Point]:
    """The outputs of every part that writes to the residual stream.

    Raises ModelError for a family in which something else does.
    """
    found = []
    for layer in parts.map.layers:
        module = parts.modules[layer.path]
        beside = [name for name in facts.FURTHER_OUTPUTS if name in module]
        if beside or (layer.moe is not None and layer.moe.block == layer.path):
            raise ModelError(
                f"layers of {parts.map.model_type} write to the residual stream beside their "
                "attention and feed-forward parts, so that paths cannot be held apart; use "
                "activation patching"
            )
        prefix = f"layers.{layer.index}"
        for kind, count in (("attn", len(layer.mixers)), ("mlp", len(layer.mlps))):
            for number in range(count):
                name = f"{prefix}.{kind}" if number == 0 else f"{prefix}.{kind}_{number + 1}"
                found.append(parts.names.point(f"{name}.output"))
    return found


class _Frozen:
    """Holds a part at its output in the corrupted run, but for rows that are its own senders."""

    def __init__(self, value: mx.array, free: Sequence[int], rows: int) -> None:
        self._value = value
        self._free = np.zeros(rows, np.bool_)
        self._free[list(free)] = True

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """The frozen value; what the part puts out in its own senders' rows."""
        mask = mx.array(self._free.reshape(-1, *[1] * (value.ndim - 1)))
        return mx.where(mask, value, self._value.astype(value.dtype))


class _Rows:
    """Puts a value of each row in place."""

    def __init__(self, value: mx.array) -> None:
        self._value = value

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """The kept value."""
        return self._value.astype(value.dtype)


def _along(
    study: Study, receiver: Point, freezing: Sequence[Point], options: Patching
) -> PatchResult:
    parts, scores, units = study.parts, study.empty(), study.units()
    held = {point.name: Saved(point) for point in freezing}
    run_once(parts, padded([study.pair.corrupted]), [], list(held.values()))
    rows = max(1, options.batch_tokens // len(study.pair.clean))
    for start in range(0, len(units), rows):
        options.ctx.check()
        some = units[start : start + rows]
        edits = [*patches(parts, study.component, some, study.kept),
                 *_freeze(study, some, held, receiver)]  # fmt: skip
        batch = padded([study.pair.corrupted] * len(some))
        seen = Saved(receiver, -1 if receiver.kind == "logits" else None)
        run_once(parts, batch, edits, [seen])
        if receiver.kind == "logits":
            values = study.rule.metric(seen.value.astype(mx.float32))
        else:
            edit = [(receiver, _Rows(seen.value))]
            values = patched_metric(parts, study.pair.corrupted, edit, len(some), study.rule)
        for unit, value in zip(some, np.array(values).tolist(), strict=True):
            study.put(scores, unit, value)
        options.ctx.progress("patched paths", start + len(some), len(units), "runs")
    return study.result("path patching", study.shares(scores), receiver.name)


def _freeze(
    study: Study, units: Sequence[Unit], held: dict[str, Saved], receiver: Point
) -> list[tuple[Point, _Frozen]]:
    """Every part is frozen in every row, but for the part that a row's sender belongs to.

    The part that the receiver belongs to is not needed, and not frozen: it takes what it receives.
    """
    kind = "attn" if study.component in ("attn", "head") else "mlp"
    edits = []
    for name, saved in held.items():
        if receiver.kind != "logits" and name.startswith(receiver.name.rpartition(".")[0] + "."):
            continue
        own = [
            row for row, unit in enumerate(units) if name == f"layers.{unit.layer}.{kind}.output"
        ]
        edits.append((saved.point, _Frozen(saved.value, own, len(units))))
    return edits
