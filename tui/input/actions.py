"""State changes for keys of kind "do". Pure: the state in, the next state out."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from mlxfun.editing.reports import StepReport
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import JobEnded
from tui.keys.keymap import PanelName
from tui.layout import PANELS, UPPER
from tui.state.app_state import AppState, HeatFlag, Scale, Shape
from tui.state.chat_turns import begins_anew


def move(state: AppState, down: int, right: int) -> AppState:
    """Move the heatmap's cursor by `down` layers and `right` experts, within the map.

    In the view of one layer experts are below one another: there the two are exchanged.
    """
    inside = state.heat.shape == "layer"
    return _step(state, right, down) if inside else _step(state, down, right)


def _step(state: AppState, down: int, right: int) -> AppState:
    """Move the cursor by `down` layers and `right` columns."""
    state = replace(state, anchor=None)
    if not state.heat.sort:
        return put(state, state.cursor[0] + down, state.cursor[1] + right)
    from tui.heat.order import column, expert, order_of

    order, (position, here) = order_of(state), state.cursor
    # On a sorted map the cursor keeps to its column: the same rank in the next layer.
    at = column(order, position, here) + right
    moved = put(state, position + down, max(0, at))
    return replace(moved, cursor=(moved.cursor[0], expert(order, *moved.cursor)))


def edge(state: AppState, right: int) -> AppState:
    """Move the cursor to the first (-1) or last (1) column."""
    _, experts = _extent(state)
    return _step(state, 0, right * experts)


def put(state: AppState, position: int, expert: int) -> AppState:
    """Move the cursor to a cell, or to the nearest one on the map."""
    count, experts = _extent(state)
    if not count:
        return state
    position = max(0, min(position, count - 1))
    expert = max(0, min(expert, experts - 1))
    return replace(state, cursor=(position, expert))


def _extent(state: AppState) -> tuple[int, int]:
    """(number of MoE layers, experts of a layer), 0 without a model."""
    view = state.view
    if view.heat is not None:
        return len(view.heat.layers), view.heat.experts
    return (view.model.moe_layers, view.model.experts) if view.model is not None else (0, 0)


def point(state: AppState, position: int, at: int) -> AppState:
    """Move the cursor to a column of the map as it is shown."""
    state = put(replace(state, anchor=None), position, at)
    if not state.heat.sort:
        return state
    from tui.heat.order import expert, order_of

    return replace(state, cursor=(state.cursor[0], expert(order_of(state), *state.cursor)))


def next_metric(state: AppState, names: tuple[str, ...], shown: str) -> AppState:
    """Show the metric that follows `shown` in `names`, the first after the last."""
    if not names:
        return state
    place = names.index(shown) if shown in names else -1
    wanted = names[(place + 1) % len(names)]
    return replace(state, heat=replace(state.heat, metric=wanted))


def toggle(state: AppState, option: HeatFlag) -> AppState:
    """Toggle an option of the heatmap: per_layer, fit or sort."""
    flag = not getattr(state.heat, option)
    match option:
        case "per_layer":
            heat = replace(state.heat, per_layer=flag)
        case "fit":
            heat = replace(state.heat, fit=flag)
        case _:
            heat = replace(state.heat, sort=flag)
    return replace(state, heat=heat)


def next_scale(state: AppState) -> AppState:
    """Take the next colour scale."""
    scales = get_args(Scale)
    wanted = scales[(scales.index(state.heat.scale) + 1) % len(scales)]
    return replace(state, heat=replace(state.heat, scale=wanted))


def shape(state: AppState, wanted: Shape) -> AppState:
    """Show the experts as "map", "layer" or "table"; as the map if they already are that."""
    now: Shape = "map" if state.heat.shape == wanted else wanted
    return replace(state, heat=replace(state.heat, shape=now))


def pick_panel(state: AppState, panel: PanelName) -> AppState:
    """Note that `panel` has the focus."""
    if panel not in PANELS:
        return state
    beside = state.beside if panel == "experts" else panel
    upper = panel if panel in UPPER else state.upper
    unseen = state.unseen - {panel}
    return replace(state, panel=panel, beside=beside, front=panel, upper=upper, unseen=unseen)


def reveal(state: AppState, panel: PanelName, *, aside: bool = False) -> AppState:
    """Bring `panel` to the front where not all panels fit; the focus stays.

    aside: only if it does not replace the panel in front.
    """
    beside = state.beside if panel == "experts" else panel
    upper = panel if panel in UPPER else state.upper
    front, unseen = state.front if aside else panel, state.unseen - {panel}
    return replace(state, beside=beside, front=front, upper=upper, unseen=unseen)


def mark_unseen(state: AppState, panel: PanelName) -> AppState:
    """Mark on the tab of `panel` that it has an outcome to show."""
    return replace(state, unseen=state.unseen | {panel})


def panel_for(event: JobEnded) -> PanelName | None:
    """The panel that shows the outcome of a job, None if no panel has to be shown."""
    if event.report is None:
        return None
    if isinstance(event.report, EvaluateReport) and event.report.subject == "candidate":
        return "plan"
    if isinstance(event.report, StepReport):
        # The history shows the new state; staging has a panel of its own.
        return None if event.report.action in ("flip", "discard") else "history"
    if begins_anew(event.line):
        return "chat"
    return _PANEL_OF.get(event.report.kind, "log")


# By kind of report; None for those that are shown without a panel.
_PANEL_OF: dict[str, PanelName | None] = {
    "plan": "plan",
    "abliterate": "plan",
    "chat": "chat",
    "ab": "chat",
    "history": "history",
    "collect": "experts",
    "steer": None,
    "probe": "plan",
    "dossier": None,
    "serving": None,
}


def zoom(state: AppState) -> AppState:
    """Show the focused panel on the whole screen, or all panels again."""
    return replace(state, zoomed=not state.zoomed)
