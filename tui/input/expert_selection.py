"""Selecting experts in the map: state changes and the cost of a selection. Pure.

A draft is a selection that is not staged yet. Its bytes and shares follow from the view alone; when
it has not changed for a while, one `select` line stages it. Numeric modules are
imported inside, since the first paint comes before they are needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from commands.conditions import selectable
from mlxfun.session.reports import SessionView
from mlxfun.text import counted, readable_bytes
from tui.state.app_state import AppState, Draft, Entry

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.techniques.prune.manual_mask import Field

IDLE_SECONDS = 0.7
"""Seconds without a change after which the draft becomes a command line."""

PICKS = 100
"""Changes of a selection that undo takes back."""

DEFAULT_METRIC = "reap_sum"
UNMEASURED = "nothing is measured yet: press {collect} to calibrate"


def metric_of(state: AppState) -> str:
    """The metric that scores are taken from: the one shown, if experts can be pruned by it."""
    from mlxfun.calibration.options import METRICS

    wanted = state.heat.metric
    return wanted if wanted in METRICS else DEFAULT_METRIC


def field_of(state: AppState) -> Field | None:
    """The experts that can be selected, with their scores; None without a model."""
    from mlxfun.techniques.prune.manual_mask import Field

    heat, model = state.view.heat, state.view.model
    if heat is None or model is None:
        return None
    count = len(heat.layers)
    return Field(
        layers=heat.layers,
        alive=heat.alive,
        protected=heat.protected,
        scores=heat.metrics.get(metric_of(state)),
        top_k=(model.top_k,) * count,
        groups=(max(1, model.groups),) * count,
        open_groups=(max(1, model.open_groups),) * count,
    )


def pruned_mask(state: AppState) -> Array | None:
    """The experts to be pruned, bool [L, E]: the draft's, else the staged plan's."""
    if state.draft is not None:
        return state.draft.pruned
    return state.view.heat.condemned if state.view.heat else None


def why_not(state: AppState) -> str:
    """Why no expert can be selected now, "" if they can."""
    return selectable(state.view) or ""


# Ranges ---------------------------------------------------------------------------------------
def stretch(state: AppState, down: int, right: int) -> AppState:
    """Move the cursor and keep the range's other corner."""
    from tui.input import actions

    anchor = state.anchor or state.cursor
    return replace(actions.move(state, down, right), anchor=anchor)


def span(state: AppState, way: Literal["row", "column"]) -> AppState:
    """Make a whole "column" or "row" the range.

    A column is an expert number, or on a sorted map a rank, in every layer; a row is a layer.
    """
    heat = state.view.heat
    if heat is None:
        return state
    from tui.heat.order import column, expert, order_of

    order, (row, here) = order_of(state), state.cursor
    top, bottom, left, right = row, row, 0, heat.experts - 1
    if way == "column":
        left = right = column(order, row, here)
        top, bottom = 0, len(heat.layers) - 1
    start, end = (top, expert(order, top, left)), (bottom, expert(order, bottom, right))
    return replace(state, anchor=start, cursor=end)


def marked(state: AppState) -> Array:
    """The experts of the range, or the one under the cursor, bool [L, E]."""
    from tui.heat.order import order_of, rectangle

    heat = state.view.heat
    assert heat is not None
    corners = (state.anchor or state.cursor, state.cursor)
    return rectangle(order_of(state), corners, heat.alive.shape)


# Changing the draft ---------------------------------------------------------------------------
def toggle(state: AppState, now: float) -> AppState:
    """Select the range or the expert under the cursor; deselect it if all of it is selected."""
    field, before = field_of(state), pruned_mask(state)
    if field is None or before is None:
        return state
    there = field.alive & marked(state)
    if not there.any():
        return _said(state, "these experts are pruned already; undo brings them back")
    after = before | there if (there & ~before).any() else before & ~there
    return _changed(replace(state, anchor=None), field, after, now)


def dial(state: AppState, step: int, now: float) -> AppState:
    """Prune one expert more (step 1) or fewer (-1) from every layer, by score.

    With a grouped router, as many as the groups require.
    """
    from mlxfun.techniques.prune import manual_mask

    field, before = field_of(state), pruned_mask(state)
    if field is None or before is None:
        return state
    lost = manual_mask.counts(before)
    # If the layers differ, the first step evens them out.
    at = max(lost) if step > 0 else min(lost)
    even = min(lost) == max(lost)
    wanted = at + step * field.step if even else at
    return _by_score(state, field, before, max(0, wanted), now)


def even(state: AppState, now: float) -> AppState:
    """Prune as many from every layer as from the one that loses most, by score."""
    field, before = field_of(state), pruned_mask(state)
    if field is None or before is None:
        return state
    return _by_score(state, field, before, None, now)


def _by_score(
    state: AppState, field: Field, before: Array, count: int | None, now: float
) -> AppState:
    from mlxfun.errors import MlxfunError
    from mlxfun.techniques.prune import manual_mask

    try:
        return _changed(state, field, manual_mask.evened(field, before, count), now)
    except MlxfunError as problem:
        return _said(state, str(problem))


def threshold(state: AppState, now: float) -> AppState:
    """Prune all experts whose share of their layer's metric is at most that under the cursor."""
    import numpy as np

    field, before = field_of(state), pruned_mask(state)
    if field is None or before is None:
        return state
    if field.scores is None:
        return _said(state, state.names.say(UNMEASURED))
    scores = np.where(field.alive, field.scores, 0.0)
    total = scores.sum(axis=1, keepdims=True)
    share = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
    after = before | ((share <= share[state.cursor]) & field.alive & ~field.protected)
    return _changed(state, field, after, now)


def _changed(state: AppState, field: Field, after: Array, now: float) -> AppState:
    """The state with a new draft, unless the router could not run with it."""
    broken = field.unrunnable(after)
    if broken and max(field.groups) == 1:
        return _said(state, broken)
    before = pruned_mask(state)
    picked = state.picked if before is None else (*state.picked, before)[-PICKS:]
    return replace(state, draft=Draft(after, now), picked=picked, echo=None)


def undoable(state: AppState) -> bool:
    """Whether undo takes back a change of the selection."""
    plan = state.view.plan
    by_hand = state.draft is not None or (plan is not None and plan.strategy == "hand")
    return by_hand and bool(state.picked)


def undo(state: AppState, now: float) -> AppState:
    """The selection before its last change."""
    return replace(
        state, draft=Draft(state.picked[-1], now), picked=state.picked[:-1], anchor=None, echo=None
    )


def _said(state: AppState, text: str) -> AppState:
    return replace(state, anchor=None, echo=Entry("warning", "", text))


# From draft to plan ---------------------------------------------------------------------------
def _idle(state: AppState, now: float) -> bool:
    """Whether the draft has not changed for a while and no `select` line is on its way."""
    draft = state.draft
    if draft is None or draft.sent or now - draft.since < IDLE_SECONDS:
        return False
    lines = (*(line for _, line in state.queued), *(job.line for job in state.jobs))
    return not any(line.startswith("select") for line in lines)


def due_line(state: AppState, now: float) -> str:
    """The command line that stages the draft, "" as long as it is not due."""
    draft = state.draft
    if draft is None or not _idle(state, now):
        return ""
    field, heat = field_of(state), state.view.heat
    if field is None or heat is None or field.unrunnable(draft.pruned):
        return ""
    from mlxfun.techniques.prune.manual_mask import change_line

    line = change_line(field.layers, heat.condemned, draft.pruned)
    metric = metric_of(state)
    # The plan reports what is lost by the metric that was used to select.
    return f"{line} --metric {metric}" if line and metric != DEFAULT_METRIC else line


def drop_unchanged(state: AppState, now: float) -> AppState:
    """Drop a draft that is idle and equal to the staged plan."""
    draft, heat = state.draft, state.view.heat
    if draft is None or heat is None or not _idle(state, now):
        return state
    return replace(state, draft=None) if bool((draft.pruned == heat.condemned).all()) else state


def mark_sent(state: AppState) -> AppState:
    """Note that the draft's command line is queued."""
    return replace(state, draft=replace(state.draft, sent=True)) if state.draft else state


def after_job(state: AppState, before: SessionView, line: str) -> AppState:
    """Drop the draft after a job that staged it, or that changed the plan or the weights."""
    draft, after = state.draft, state.view
    moved = after.state != before.state or (
        after.plan is not before.plan and not line.startswith("select")
    )
    if moved:
        return replace(state, draft=None, picked=())
    return replace(state, draft=None) if draft is not None and draft.sent else state


def needs_probe(state: AppState) -> bool:
    """Whether the staged selection is idle and has not been measured yet."""
    view = state.view
    if state.draft is not None or state.jobs or state.queued or view.plan is None:
        return False
    measured = view.heat is not None and view.heat.samples > 0
    known = state.probed in (view.plan.state_after, "-")
    return view.plan.strategy == "hand" and view.scores is None and measured and not known


# In words -------------------------------------------------------------------------------------
def unevenness(state: AppState) -> str:
    """Which layers lose more experts than others, "" if none does."""
    from mlxfun.techniques.prune.manual_mask import counts, unevenness

    mask, heat = pruned_mask(state), state.view.heat
    if mask is None or heat is None:
        return ""
    return unevenness(heat.layers, counts(mask))


def tally(state: AppState) -> str:
    """The selection in one short line: experts, bytes, share of the metric; "" for none."""
    from mlxfun.techniques.prune import manual_mask

    field, mask = field_of(state), pruned_mask(state)
    if field is None or mask is None or not mask.any():
        return ""
    parts = [f"{counted(int(mask.sum()), 'expert', 'experts')} pruned"]
    model = state.view.model
    if model is not None and len(model.expert_bytes) == len(mask):
        parts.append(f"-{readable_bytes(manual_mask.saved(model.expert_bytes, mask))}")
    losses = manual_mask.lost(field, mask)
    if losses is not None:
        parts.append(f"{float(losses.mean()):.1%} of activations")
    return " · ".join(parts)
