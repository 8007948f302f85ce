"""The metrics that the heatmap can show, and the one that is shown."""

from __future__ import annotations

import numpy as np

from mlxfun.arrays import Array
from mlxfun.session.reports import HeatView, SessionView
from tui.state.app_state import AppState

APART_METRICS = ("reap_sum", "freq")
PREFERRED = ("reap_sum", "reap", "freq")
ANSWER = "answer"
DIFFERENCE = "A-B "
"""How the names of differences between two files begin; the metric follows."""


def empty_heat(view: SessionView) -> HeatView | None:
    """Heat without statistics, of the resident model's size; None without a MoE model."""
    if view.model is None or view.model.moe_layers == 0:
        return None
    no = np.zeros((view.model.moe_layers, view.model.experts), bool)
    layers = tuple(range(view.model.moe_layers))
    return HeatView(layers, view.model.experts, {}, ~no, no, no, no, no, samples=0, tokens=0)


def metric_values(state: AppState, heat: HeatView) -> dict[str, Array]:
    """Every metric that can be shown: name -> float64 [L, E].

    While a calibration runs they are those of its newest frame: the session's are those of the last
    finished job.
    """
    choices: dict[str, Array] = dict(heat.metrics)
    frame = state.frame
    if frame is not None:
        choices = {"freq": frame.freq.astype(np.float64), "reap_sum": frame.reap_sum}
    if state.traffic is not None and state.traffic.shape == heat.alive.shape:
        choices[ANSWER] = state.traffic
    apart = state.compared
    if apart is not None and apart.layers == heat.layers:
        for name in APART_METRICS:
            if name in apart.share and apart.share[name].shape == heat.alive.shape:
                choices[DIFFERENCE + name] = apart.share[name]
    return choices


def chosen_metric(wanted: str | None, names: tuple[str, ...], *, answering: bool) -> str:
    """The metric to show: the wanted one if available, else the first of `PREFERRED`."""
    if wanted in names:
        return wanted
    if answering and ANSWER in names and len(names) == 1:
        return ANSWER
    return next((name for name in (*PREFERRED, *names) if name in names), "")
