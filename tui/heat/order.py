"""Order of experts in a sorted heatmap: which column shows which expert. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxfun.arrays import Array
from tui.heat.metrics import chosen_metric, empty_heat, metric_values

if TYPE_CHECKING:
    from tui.state.app_state import AppState


Cell = tuple[int, int]
"""(position of the MoE layer, expert)"""


def order_of(state: AppState) -> Array | None:
    """int [L, E]: the expert in each column, the busiest first; None while the map is not sorted.

    Pruned experts come last; equal scores keep the order of their numbers.
    """
    heat = state.view.heat or empty_heat(state.view)
    if heat is None or not state.heat.sort:
        return None
    choices = metric_values(state, heat)
    values = choices.get(chosen_metric(state.heat.metric, tuple(choices), answering=False))
    if values is None:
        return None
    shown = np.where(heat.alive, values, -np.inf)
    order: Array = np.argsort(-shown, axis=1, kind="stable")
    return order


def column(order: Array | None, position: int, expert: int) -> int:
    """The column in which an expert is shown."""
    if order is None:
        return expert
    return int(np.flatnonzero(order[position] == expert)[0])


def expert(order: Array | None, position: int, at: int) -> int:
    """The expert that is shown in column `at`."""
    return at if order is None else int(order[position, at])


def rectangle(order: Array | None, corners: tuple[Cell, Cell], shape: tuple[int, int]) -> Array:
    """bool [L, E]: the experts in the rectangle between two corners of the map as it is shown."""
    (top, left), (bottom, right) = corners
    columns = sorted((column(order, top, left), column(order, bottom, right)))
    rows = slice(min(top, bottom), max(top, bottom) + 1)
    shown = np.zeros(shape, dtype=np.bool_)
    shown[rows, columns[0] : columns[1] + 1] = True
    if order is None:
        return shown
    mask = np.zeros_like(shown)
    np.put_along_axis(mask, order, shown, axis=1)
    return mask
