"""Per-sample routing of a data set, in one pass through the model's own routers.

The taps see the indices that were chosen and the weights that were applied, so selection biases,
groups and scales count as they do in the model. Pads are masked; each batch is one
forward, run layer by layer (mlxfun.hooks.pace).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.calibration.collect import applied_weights
from mlxfun.calibration.routing_stats import require_finite
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import (
    SHORT,
    Batch,
    Line,
    Tokenizer,
    count_used,
    line_ids,
    prompt_tokens,
)
from mlxfun.data.lines import BrokenLines
from mlxfun.data.rendered import as_rendered, rendered_ids
from mlxfun.errors import DatasetError, UsageError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward, reduced
from mlxfun.hooks.routing import Record, Taps
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.device.batch_size import batch_size
from mlxfun.scans.contrast import SampleRouting
from mlxfun.tally import Tally

if TYPE_CHECKING:
    from mlxfun.arrays import Array


PASS = "sample routing"


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens: int32 [T]. answer: index of the answer's first token, None without an answer."""

    tokens: Array
    answer: int | None = None


def samples(
    lines: Sequence[Line], tokenizer: Tokenizer, max_tokens: int, tally: Tally | None = None
) -> list[Sample]:
    """What is run for each line; lines under two tokens are left out.

    A conversation that ends with the assistant's turn has an answer: that turn. One that does not
    gets the generation prompt, since how to answer is decided on its tokens.

    Raises UsageError for max_tokens < 2, DatasetError when nothing is left.
    """
    found: list[Sample] = []
    tally = tally if tally is not None else Tally()
    broken = BrokenLines(tally)
    if max_tokens < 2:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 2")
    for read in lines:
        line = as_rendered(read, tokenizer)
        with broken.counted(line.source):
            sample, length = _sample(line, tokenizer, max_tokens)
            if length < 2:
                tally.part(line.source).refuse(SHORT, line.where)
                continue
            count_used(line, tokenizer, length, max_tokens, tally)
            found.append(sample)
    broken.require_few(len(lines))
    if not found:
        raise DatasetError(f"all {len(lines)} samples are shorter than two tokens")
    return found


def _sample(line: Line, tokenizer: Tokenizer, max_tokens: int) -> tuple[Sample, int]:
    """What is run for a line, and its length before it was cut."""
    messages = line.messages
    if messages is not None and messages[-1]["role"] != "assistant":
        asked = prompt_tokens(messages, tokenizer, None, line.tools, line.where)
        return Sample(asked[:max_tokens]), len(asked)
    ids = line_ids(line, tokenizer)
    tokens = np.asarray(ids[:max_tokens], dtype=np.int32)
    start = _answer_start(line, tokens, tokenizer)
    within = start is not None and start < len(tokens)
    return Sample(tokens, start if within else None), len(ids)


def _answer_start(line: Line, tokens: Array, tokenizer: Tokenizer) -> int | None:
    """Where the last turn begins: the length of what the conversation shares with its prompt."""
    messages = line.messages
    if line.kind == "rendered" and line.payload[1]:
        asked = np.asarray(rendered_ids(str(line.payload[0]), tokenizer), dtype=np.int32)
    elif messages is None or len(messages) < 2:
        return None
    else:
        asked = prompt_tokens(messages[:-1], tokenizer, None, line.tools, line.where)
    shared = min(len(asked), len(tokens))
    differ = np.flatnonzero(asked[:shared] != tokens[:shared])
    return int(differ[0]) if len(differ) else shared


def scan(
    model: nn.Module, taps: Taps, found: Sequence[Sample], ctx: Context = SILENT, label: str = ""
) -> SampleRouting:
    """Run every sample once. Raises Cancelled between batches; nothing is kept then.

    Raises ModelError where the model computes NaN or infinity.
    """
    return scan_sets(model, taps, [found], ctx, label)[0]


def scan_sets(
    model: nn.Module,
    taps: Taps,
    sets: Sequence[Sequence[Sample]],
    ctx: Context = SILENT,
    label: str = "",
) -> list[SampleRouting]:
    """`scan` of several sets, in one reading of a model on disk. No batch is of two sets."""
    size, todo = batch_size(model, taps.anatomy), list[Batch]()
    starts = np.cumsum([0, *map(len, sets)]).tolist()
    for start, found in zip(starts, sets, strict=False):
        parts = size.split([sample.tokens for sample in found])
        todo += [replace(b, rows=tuple(start + row for row in b.rows)) for b in parts]
    every = [sample for found in sets for sample in found]
    shape = (len(taps.layers), taps.anatomy.num_experts)
    selected, weight = np.zeros((len(every), *shape)), np.zeros((len(every), *shape))
    answers = np.zeros((len(sets), *shape))
    done, label = 0, label or "scanning"

    def watched(batch: Batch) -> Watch[Array]:
        return watch(model, taps, batch, _answer_mask(batch, every))

    task = Task(label, PASS, given=lambda batch: {"answers": _answer_mask(batch, every)})
    for batch, made in each_forward(model, taps.anatomy, todo, watched, ctx, task):
        sums = made.astype(np.float64)
        require_finite(sums)
        rows = list(batch.rows)
        selected[rows] = sums[:, :, 0].swapaxes(0, 1)
        weight[rows] = sums[:, :, 1].swapaxes(0, 1)
        answers[bisect_right(starts, rows[0]) - 1] += sums[:, :, 2].sum(axis=1)
        done += len(rows)
        ctx.progress(label, done, len(every), "samples")
    return [
        _routing(found, selected[start:], weight[start:], answers[number])
        for number, (start, found) in enumerate(zip(starts, sets, strict=False))
    ]


def _routing(
    found: Sequence[Sample], selected: Array, weight: Array, answers: Array
) -> SampleRouting:
    """Of one set. selected, weight: sums over tokens, [N, L, E], those of other sets behind them."""
    tokens = np.array([len(sample.tokens) for sample in found], dtype=np.int64)
    per_token = 1.0 / tokens[:, None, None]
    in_answers = sum(len(s.tokens) - s.answer for s in found if s.answer is not None)
    count = len(found)
    means = selected[:count] * per_token, weight[:count] * per_token
    return SampleRouting(*means, tokens, answers, in_answers)


def _answer_mask(batch: Batch, found: Sequence[Sample]) -> Array:
    """bool [B, T]: real tokens of the answers."""
    mask = batch.mask.copy()
    for row, index in enumerate(batch.rows):
        start = found[index].answer
        mask[row, : mask.shape[1] if start is None else start] = False
    return mask


def watch(model: nn.Module, taps: Taps, batch: Batch, in_answer: Array) -> Watch[Array]:
    """Sums of one batch, float32 [L, B, 3, E]."""
    masks = mx.array(np.stack([batch.mask, in_answer]).astype(np.float32))
    reduction = taps.reduction(lambda tap, r: row_sums(tap.layer, [r], masks), norms=False)
    return reduced(model, taps, batch, reduction)


def row_sums(layer: MoELayer, records: Sequence[Record], masks: mx.array) -> mx.array:
    """Per row of the batch, float32 [B, 3, E], lazy: selections, weights, selections in answers.

    masks: [2, B, T], 1.0 on real tokens and on tokens of answers. As in calibrate.layer_sums, a
    product with a one-hot matrix adds in a fixed order; counts of one row are exact in float32.
    """
    experts = layer.num_experts
    _, rows, width = masks.shape
    total = mx.zeros((rows, 3, experts))
    for record in records:
        k = record.indices.shape[-1]
        index = record.indices.reshape(rows, width * k)
        weights = applied_weights(record).reshape(rows, width * k).astype(mx.float32)
        masked = mx.repeat(masks, k, axis=-1)  # [2, B, T * K]
        if layer.router_rows > experts:
            # longcat's zero experts appear as index 0 with weight 0: nothing was routed there.
            masked = masked * (weights != 0)
        # Selected by `where`: a pad's weight may be NaN, and 0 times NaN is NaN.
        applied = mx.where(masked[0] > 0, weights, 0.0)
        values = mx.stack([masked[0], applied, masked[1]], axis=1)
        one_hot = (index[..., None] == mx.arange(experts)).astype(mx.float32)
        total = total + values @ one_hot
    return total
