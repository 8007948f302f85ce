"""Moving the map's cursor to an expert by name, and through the flagged ones. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from tui.state.app_state import AppState

if TYPE_CHECKING:
    from mlxfun.arrays import Array

_NAME = re.compile(r"\s*L?(\d+)(?:\s*:\s*E?(\d+))?\s*\Z", re.IGNORECASE)


def jump(state: AppState, text: str) -> tuple[AppState, str]:
    """The cursor on the expert that `text` names (12:40, L12:E40, or a layer), or why not.

    Other words are searched among the topics and the marks of experts, from the cursor on; in the
    view of a layer a number is one of its experts.
    """
    found, heat = _NAME.match(text), state.view.heat
    if found is None:
        return search(state, text, 1)
    if state.heat.shape == "layer" and not found[2] and "l" not in text.lower():
        layer = heat.layers[state.cursor[0]] if heat is not None else 0
        return jump(state, f"{layer}:{found[1]}")
    layer, expert = int(found[1]), int(found[2]) if found[2] else state.cursor[1]
    if heat is None or layer not in heat.layers:
        last = f"{heat.layers[0]} to {heat.layers[-1]}" if heat is not None else "none"
        return state, f"layer {layer} has no experts; the MoE layers are {last}"
    if not 0 <= expert < heat.experts:
        return state, f"expert {expert} does not exist; the experts are 0 to {heat.experts - 1}"
    return replace(state, anchor=None, cursor=(heat.layers.index(layer), expert)), ""


def is_name(text: str) -> bool:
    """Whether `text` names an expert or a layer, and is no words to search for."""
    return _NAME.match(text) is not None


def search(state: AppState, text: str, by: int) -> tuple[AppState, str]:
    """The cursor on the next (1) or previous (-1) expert whose topic or mark has the words `text`,
    row by row, or why not."""
    from tui.heat.model import heat_model
    from tui.heat.words import status

    model, low = heat_model(state), text.strip().lower()
    if model is None or not low:
        return state, f"{text!r} is no expert: type layer:expert, such as 12:40"
    heat, experts = model.heat, model.experts
    here, count = state.cursor[0] * experts + state.cursor[1], len(model.layers) * experts
    for step in range(1, count + 1):
        row, expert = divmod((here + by * step) % count, experts)
        words = heat.topics.get((model.layers[row], expert), "")
        words += f" {status(model, row, expert, state.view.steering)}"
        words += "" if heat.alive[row, expert] else " pruned"
        if low in words.lower():
            return replace(state, anchor=None, cursor=(row, expert)), ""
    return state, f"no expert is called or marked {text!r}: type layer:expert, such as 12:40"


def flagged(state: AppState) -> Array | None:
    """bool [L, E]: experts pruned, to be pruned, steered, protected or never seen."""
    from tui.input.expert_selection import pruned_mask

    heat = state.view.heat
    if heat is None:
        return None
    marked = heat.activated | heat.deactivated | heat.protected | ~heat.alive
    going = pruned_mask(state)
    marked = marked if going is None else marked | going
    freq = heat.metrics.get("freq")
    return marked if freq is None else marked | (freq == 0)


def step_flagged(state: AppState, by: int) -> tuple[AppState, str]:
    """The cursor on the next (1) or previous (-1) flagged expert, row by row, or why not."""
    import numpy as np

    marked = flagged(state)
    if marked is None or not marked.any():
        return state, "no expert is pruned, steered, protected or never seen"
    from tui.heat.order import column, expert, order_of

    order = order_of(state)
    if order is not None:
        marked = np.take_along_axis(marked, order, axis=1)
    across = marked.shape[1]
    here = state.cursor[0] * across + column(order, *state.cursor)
    places = np.flatnonzero(marked.reshape(-1))
    after = places[places > here] if by > 0 else places[places < here][::-1]
    # Behind the last comes the first.
    at = int(after[0] if after.size else (places[0] if by > 0 else places[-1]))
    row, place = divmod(at, across)
    return replace(state, anchor=None, cursor=(row, expert(order, row, place))), ""
