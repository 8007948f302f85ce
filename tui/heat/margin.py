"""Figures of each layer, shown to the right of the map where there is room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from tui.heat.model import HeatModel

TITLE = " balance   pruned"
WIDTH = len(TITLE) + 1
LEAST, MOST = 48, 96
"""Columns that are left to the map: at least, and enough for any model."""


def margin_for(experts: int, width: int) -> int:
    """Columns of the margin in a window of `width` columns, 0 where the map needs them.

    >>> margin_for(16, 66), margin_for(128, 66), margin_for(128, 115), margin_for(512, 200)
    (18, 0, 18, 18)
    """
    wanted = max(LEAST, min(experts // 2, MOST))
    return WIDTH if width - WIDTH >= wanted else 0


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """balance: float [L], exp(entropy) over the number of experts, NaN without statistics; pruned:
    int [L], pruned and to be pruned; experts: E."""

    balance: Array
    pruned: Array
    experts: int

    def text(self, first: int, last: int) -> str:
        """The figures of the layers `first` to `last`, which share a line."""
        rows = slice(first, last + 1)
        mean = float(self.balance[rows].mean())
        balance = "" if np.isnan(mean) else f"{mean:.0%}"
        count = int(self.pruned[rows].sum())
        pruned = f"{count}/{self.experts * (last + 1 - first)}" if count else "-"
        return f"{balance:>8}{pruned:>9}"


def figures(model: HeatModel) -> Figures:
    """The figures of every layer of a map."""
    heat = model.heat
    gone = (~heat.alive | heat.condemned).sum(axis=1)
    if model.values is None:
        return Figures(np.full(len(gone), np.nan), gone, model.experts)
    values = np.where(heat.alive, np.nan_to_num(np.maximum(model.values, 0.0)), 0.0)
    total = values.sum(axis=1, keepdims=True)
    share = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    alive = np.maximum(heat.alive.sum(axis=1), 1)
    balance = np.where(total[:, 0] > 0, np.exp(entropy) / alive, np.nan)
    return Figures(balance, gone, model.experts)
