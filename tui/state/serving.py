"""The server beside the screen: which request is selected, and whose experts light up the map."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlxfun.serving.snapshot import RequestLine, ServingReport
from tui.state.app_state import AppState
from tui.state.reducer import add_traffic

if TYPE_CHECKING:
    from mlxfun.arrays import Array


def taken(state: AppState, report: ServingReport) -> AppState:
    """The state with a newer picture of the server. Where the chat of this shell is being answered,
    the map goes on showing that."""
    new = report.lit is not (state.serving.lit if state.serving is not None else None)
    state = replace(state, serving=report)
    gone = state.spotlight is not None and state.spotlight not in {r.id for r in report.requests}
    if gone:
        state = replace(state, spotlight=None, traffic=None)
    answering = bool(state.turns) and not state.turns[-1].done
    if answering or state.view.heat is None:
        return state
    lit = _lit(state, report)
    if lit is None:
        return replace(state, lit=None) if not report.requests and not state.turns else state
    shown = state.lit is not None and not new
    if shown or lit.shape[0] != len(state.view.heat.layers):
        return state
    traffic = add_traffic(state.traffic, lit, state.view.heat.experts)
    return replace(state, lit=lit, traffic=traffic, token=None)


def _lit(state: AppState, report: ServingReport) -> Array | None:
    """The experts of a token of the request in the spotlight, or of one of each request."""
    if state.spotlight is not None:
        return report.lit.get(state.spotlight)
    if not report.lit:
        return None
    import numpy as np  # the first paint comes before anything numeric is needed

    return np.concatenate(list(report.lit.values()), axis=1)


def spotlight(state: AppState, request: int | None) -> AppState:
    """Let the map light up by one request, or by all if it already is that one."""
    wanted = None if request == state.spotlight else request
    return replace(state, spotlight=wanted, traffic=None, lit=None)


def line_of(state: AppState) -> str:
    """The command line that holds requests back, or answers them again."""
    doing = state.serving.doing if state.serving is not None else "open"
    return "serve pause" if doing == "open" else "serve resume"


def requests(state: AppState) -> tuple[RequestLine, ...]:
    """The requests of the newest picture."""
    return state.serving.requests if state.serving is not None else ()
