"""What is measured of a batch, by position: those whose next token is real, their targets and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.data.datasets import Batch
from mlxfun.model.distributions import log_softmax

if TYPE_CHECKING:
    from mlxfun.arrays import Array

HALF_LIMIT = 6.0e4
"""Hidden states beyond this do not fit float16 and are kept as they are."""


def by_row(states: mx.array, batch: Batch) -> dict[int, mx.array]:
    """Hidden states [n, D] of a batch by sequence."""
    ends = np.cumsum(batch.mask[:, 1:].sum(axis=1))
    return {
        row: states[int(end - count) : int(end)]
        for row, end, count in zip(batch.rows, ends, np.diff(ends, prepend=0), strict=True)
    }


def predicting(values: mx.array, batch: Batch) -> mx.array:
    """Rows [n, ...] of values [B, T, ...] at positions whose next token is real."""
    flat = values[:, :-1].reshape(-1, values.shape[-1])
    return flat[mx.array(positions(batch))]


def positions(batch: Batch) -> Array:
    """Flat indices into [B, T-1] of positions whose next token is real."""
    index: Array = np.nonzero(batch.mask[:, 1:].reshape(-1))[0].astype(np.uint32)
    return index


def sequence_numbers(batch: Batch) -> Array:
    """Sequence number of each predicting position, in the order of `positions`."""
    rows = np.array(batch.rows)[:, None]
    numbers: Array = np.broadcast_to(rows, batch.mask[:, 1:].shape)[batch.mask[:, 1:]]
    return numbers


def targets_of(batch: Batch) -> Array:
    """The real next tokens, int32 [n]."""
    targets: Array = batch.tokens[:, 1:].reshape(-1)[positions(batch)]
    return targets


def token_losses(logits: mx.array, targets: Array) -> tuple[mx.array, mx.array]:
    """Negative log-likelihoods [n] of the targets and log-probabilities [n, V], of logits [n, V]."""
    logq = log_softmax(logits)
    chosen = mx.take_along_axis(logq, mx.array(targets)[:, None], axis=-1)
    return -chosen[:, 0], logq


def as_half(hidden: mx.array) -> mx.array:
    """Hidden states in float16, where they fit."""
    fits = mx.max(mx.abs(hidden.astype(mx.float32))) < HALF_LIMIT
    return hidden.astype(mx.float16) if bool(fits.item()) else hidden


def to_host(states: mx.array) -> Array:
    """An array as NumPy holds it, bit for bit: bfloat16, which that does not know, as uint16."""
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)


def from_host(states: Array) -> mx.array:
    """The array that `to_host` was given."""
    found = mx.array(states)
    return found.view(mx.bfloat16) if states.dtype == np.uint16 else found
