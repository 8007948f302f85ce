"""Features of an autoencoder: where they are active, and interventions with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.errors import UsageError
from mlxfun.tracing.activations import batches
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.sae.autoencoder import Autoencoder
from mlxfun.tracing.sae.sources import ModelSource

READ_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Activity:
    """Features over `tokens` values. density: [F], share of them at which each is active. mean: [F],
    its mean there, 0 without any. values: [F, n], its largest, falling, 0 where there are fewer;
    places: int [F, n, 2], (sample in `rows`, position) of each."""

    density: Array
    mean: Array
    values: Array
    places: Array
    rows: list[list[int]]
    tokens: int


def feature_activity(
    sae: Autoencoder, source: ModelSource, examples: int = 10, ctx: Context = SILENT
) -> Activity:
    """Density and the largest values of every feature over a source, in bounded memory.

    Raises UsageError for a source of another width, or without values.
    """
    if source.width != sae.width:
        raise UsageError(f"{source.at} has {source.width} values, the autoencoder {sae.width}")
    values = np.zeros((sae.features, examples), np.float32)
    places = np.zeros((sae.features, examples, 2), np.int32)
    count, total, tokens = np.zeros(sae.features, np.int64), np.zeros(sae.features), 0
    units, done = batches(source.rows, READ_TOKENS), 0
    for some in units:
        x, where = source.read_placed(some, ctx)
        for first in range(0, len(x), sae.rows_at_once()):
            cut = slice(first, first + sae.rows_at_once())
            active = sae.encode(mx.array(x[cut]))
            count += np.array((active > 0).sum(0))
            total += np.array(active.sum(0))
            values, places = _merged(values, places, active, where[cut])
        tokens, done = tokens + len(x), done + len(some)
        ctx.progress("features", done, len(source.rows), "samples")
    if not tokens:
        raise UsageError(f"{source.at} has no value on these samples; give more or other text")
    mean = total / np.maximum(count, 1)
    return Activity(count / tokens, mean, values, places, source.rows, tokens)


def _merged(values: Array, places: Array, active: mx.array, where: Array) -> tuple[Array, Array]:
    """The largest of those so far [F, n] and of new ones [N, F], falling."""
    most = min(values.shape[1], len(active))
    chosen = mx.argpartition(-active, most - 1, axis=0)[:most]
    best = np.array(chosen).T
    both = np.concatenate([values, np.array(mx.take_along_axis(active, chosen, axis=0)).T], axis=1)
    at = np.concatenate([places, where[best].astype(np.int32)], axis=1)
    order = np.argsort(-both, axis=1, kind="stable")[:, : values.shape[1]]
    return np.take_along_axis(both, order, axis=1), np.take_along_axis(at, order[..., None], axis=1)


def steer_feature(
    sae: Autoencoder,
    feature: int,
    strength: float,
    *,
    positions: Sequence[int] | int | None = None,
) -> Intervention:
    """Add `strength` times the feature's direction to the value: as if it were so much more active."""
    row = sae.W_dec[sae.require_feature(feature)]
    numbers = float(feature), float(strength)
    return Intervention("steer_feature", numbers, row, positions=positions)


def clamp_feature(
    sae: Autoencoder,
    feature: int,
    level: float,
    *,
    positions: Sequence[int] | int | None = None,
) -> Intervention:
    """Set a feature to `level` and leave the rest of the value, reconstruction error included.

        x + (level - f(x)) W_dec[feature]

    A. Templeton et al., Scaling monosemanticity, 2024. level 0 takes the feature away.
    """
    row = sae.W_dec[sae.require_feature(feature)]

    def clamped(value: mx.array) -> mx.array:
        now = sae.encode(value)[..., feature : feature + 1]
        return value + ((level - now) * row).astype(value.dtype)

    told = mx.stack([row, sae.W_enc[:, feature]])  # what tells it from another in the history
    mx.eval(told)
    return Intervention(
        "clamp_feature", (float(feature), float(level)), told, clamped, positions=positions
    )
