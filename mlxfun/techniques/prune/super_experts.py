"""Super experts: the few whose activations are outliers of the whole model.

Without them a model loses its attention sinks and answers with noise, whatever their saliency says.
The rule is that of REAP's reference implementation (github.com/CerebrasResearch/reap): an expert is
one if the largest absolute value that it ever put out is above the 99.5th percentile of all experts
and above a tenth of the largest, in the first three quarters of the MoE layers (outliers of the
last ones are what the output head reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.arrays import Mask
from mlxfun.calibration.routing_stats import require_finite
from mlxfun.context import SILENT, Context
from mlxfun.errors import StateError, UsageError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward, reduced
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.model.anatomy.masks import mask_of
from mlxfun.model.device.batch_size import batch_size
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

PERCENTILE = 99.5
PASS = "expert peaks"
OF_THE_LARGEST = 0.1
FIRST_LAYERS = 0.75
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Spared:
    """Super experts that stay. mask: bool [L, E]. note: a sentence for the user."""

    mask: Mask
    note: str


def outliers(peaks: Array, alive: Mask) -> tuple[Mask, float]:
    """(super experts, bool [L, E]; the threshold) of peaks float64 [L, E].

    peaks: the largest absolute value in any output of each expert, 0 for one that was never routed.
    Experts that are not alive neither count nor are found.

    >>> peaks = np.array([[1.0, 2.0, 90.0, 1.5]] * 4)
    >>> outliers(peaks + np.arange(4)[:, None], np.ones((4, 4), dtype=bool))[0].any(axis=0).tolist()
    [False, False, False, False]
    >>> peaks[0, 2] = 900.0
    >>> np.argwhere(outliers(peaks, np.ones((4, 4), dtype=bool))[0]).tolist()
    [[0, 2]]
    """
    seen = peaks[alive]
    threshold = max(float(np.percentile(seen, PERCENTILE)), float(seen.max()) * OF_THE_LARGEST)
    mask: Mask = np.logical_and(alive, peaks > threshold)
    mask[int(len(peaks) * FIRST_LAYERS) :] = False
    return mask, threshold


def find(workspace: Workspace, options: PruneOptions, ctx: Context = SILENT) -> Spared | None:
    """The super experts of the committed model, None where the options do not spare them.

    Runs the text of the last collect once. Raises StateError without any, UsageError beside an
    expert list, which has chosen.
    """
    if not options.spares_super_experts:
        return None
    if options.expert_list is not None:
        if options.super_experts is None:
            return None
        raise UsageError(
            "--expert-list already says which experts to prune; leave out --super-experts"
        )
    if not workspace.calibration:
        raise StateError(
            "super experts are found on the text of the last collect, and there is none (a file of "
            "statistics does not hold it); run `collect --dataset ...` first, or leave out "
            "--super-experts"
        )
    anatomy = workspace.anatomy
    with workspace.editor.live("base"), workspace.editor.unsteered():
        peaks = _peaks(workspace, ctx)
    mask, threshold = outliers(peaks, mask_of(anatomy, workspace.editor.committed))
    return Spared(mask, _note(mask, peaks, threshold, anatomy.indices))


def _note(mask: Mask, peaks: Array, threshold: float, layers: tuple[int, ...]) -> str:
    cells = sorted(np.argwhere(mask).tolist(), key=lambda cell: -peaks[cell[0], cell[1]])
    if not cells:
        return (
            f"no super experts to protect: no output in the first {FIRST_LAYERS:.0%} of the layers "
            f"has a value above {threshold:.4g}"
        )
    shown = ", ".join(f"L{layers[row]}:E{e} ({peaks[row, e]:.4g})" for row, e in cells[:SHOWN])
    more = f" and {len(cells) - SHOWN} more" if len(cells) > SHOWN else ""
    return (
        f"super experts stay, whose outputs hold values above {threshold:.4g}: {shown}{more}; "
        "--super-experts ignore allows it"
    )


def _peaks(workspace: Workspace, ctx: Context) -> Array:
    """The largest absolute value in any output of each expert, float64 [L, E]."""
    anatomy = workspace.anatomy
    found = np.zeros((len(anatomy.layers), anatomy.num_experts))
    given = batch_size(workspace.model, anatomy).split(workspace.calibration)
    total, done = sum(len(batch.rows) for batch in given), 0
    label = "finding super experts"
    model, taps = workspace.model, workspace.taps
    for batch, made in each_forward(
        model, anatomy, given, lambda batch: watch(model, taps, batch), ctx, Task(label, PASS)
    ):
        peaks = made.astype(np.float64)
        require_finite(peaks)
        found = np.maximum(found, peaks)
        done += len(batch.rows)
        ctx.progress(label, done, total, "samples")
    return found


def watch(model: nn.Module, taps: Taps, batch: Batch) -> Watch[Array]:
    """Those of one batch, float32 [L, E]."""
    mask = mx.array(batch.mask.reshape(-1).astype(np.float32))

    def reduce(tap: LayerTap, record: Record) -> mx.array:
        return layer_peaks(tap, record, mask)

    reduction = taps.reduction(reduce, norms=False, peaks=True, join=mx.maximum)
    return reduced(model, taps, batch, reduction)


def layer_peaks(tap: LayerTap, record: Record, mask: mx.array) -> mx.array:
    """float32 [E], lazy. mask: [N] 1.0 for tokens that count."""
    if record.peaks is None or record.weights is None:
        raise RuntimeError("peaks were not recorded")
    k = record.indices.shape[-1]
    index = record.indices.reshape(-1, k)
    valid = mx.broadcast_to(mask[:, None], index.shape)
    if tap.layer.router_rows > tap.layer.num_experts:
        # longcat's zero experts appear as index 0 with weight 0: nothing was routed there.
        valid = valid * (record.weights.reshape(-1, k) != 0)
    values = mx.where(valid > 0, record.peaks.reshape(-1, k), 0.0)
    chosen = index.reshape(-1, 1) == mx.arange(tap.layer.num_experts)
    return mx.max(mx.where(chosen, values.reshape(-1, 1), 0.0), axis=0)
