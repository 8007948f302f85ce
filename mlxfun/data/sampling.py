"""Even samples of the tokens of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch


def spread(batches: Sequence[Batch], most: int) -> list[Array]:
    """At most `most` of all real tokens, evenly spread: for each batch indices into its [B * T]."""
    real = [np.flatnonzero(batch.mask.reshape(-1)) for batch in batches]
    chosen = spread_of(sum(map(len, real)), most)
    ends = np.cumsum([len(tokens) for tokens in real])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = [0, *ends[:-1]]
    return [tokens[part - at] for tokens, part, at in zip(real, parts, starts, strict=True)]


def spread_of(total: int, most: int) -> Array:
    """At most `most` of range(total), evenly spread, ascending.

    >>> spread_of(10, 4).tolist()
    [0, 3, 6, 9]
    """
    index: Array = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
    return index
