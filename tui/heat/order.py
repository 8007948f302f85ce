"""Order of experts in a sorted heatmap: which column shows which expert. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tui.heat.model import Array, blank, choose, sources

if TYPE_CHECKING:
    from tui.state import AppState


def order_of(state: AppState) -> Array | None:
    """int [L, E]: the expert in each column, the busiest first; None while the map is not sorted.

    Pruned experts come last; equal scores keep the order of their numbers.
    """
    heat = state.view.heat or blank(state.view)
    if heat is None or not state.heat.sort:
        return None
    choices = sources(state, heat)
    values = choices.get(choose(state.heat.metric, tuple(choices), answering=False))
    if values is None:
        return None
    shown = np.where(heat.alive, values, -np.inf)
    order: Array = np.argsort(-shown, axis=1, kind="stable")
    return order


def column(order: Array | None, position: int, expert: int) -> int:
    """The column that shows an expert."""
    if order is None:
        return expert
    return int(np.flatnonzero(order[position] == expert)[0])


def expert(order: Array | None, position: int, at: int) -> int:
    """The expert that a column shows."""
    return at if order is None else int(order[position, at])


def rectangle(order: Array | None, corners: Any, shape: tuple[int, int]) -> Array:
    """bool [L, E]: what two (position, expert) corners mark on the map as it is shown."""
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
