"""What one frame of the biggest heatmap costs: 94 layers x 512 experts on 200x50 cells.

Run with `pytest -n 0 -m bench -s tests/bench/test_heatmap_frame.py`. CPU time, so that a busy machine
does not decide it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from textual.app import App, ComposeResult

from mlxfun.session.reports import HeatView, SessionView
from tui.heat.model import LEVELS, LIT, HeatModel, heat_model
from tui.state.app_state import AppState
from tui.widgets.experts.heatmap import Heatmap

pytestmark = pytest.mark.bench

LAYERS, EXPERTS, SIZE, FRAMES = 94, 512, (200, 50), 30
BUDGET_MS = 9.0


class Alone(App[None]):
    """The heatmap with the whole terminal."""

    def compose(self) -> ComposeResult:
        yield Heatmap()


def models(count: int) -> list[HeatModel]:
    """Frames that all differ from one another in every line."""
    random = np.random.default_rng(0)
    no = np.zeros((LAYERS, EXPERTS), bool)
    out = []
    for _ in range(count):
        metrics = {"reap_sum": random.gamma(1.0, size=no.shape)}
        heat = HeatView(
            tuple(range(LAYERS)), EXPERTS, metrics, ~no, no, no, no, no, samples=1, tokens=1
        )
        model = heat_model(AppState(view=SessionView(heat=heat)))
        assert model is not None
        out.append(model)
    return out


def paint(heatmap: Heatmap, model: HeatModel, app: App[None]) -> int:
    """One whole frame as bytes for the terminal; returns how many."""
    heatmap.show(model, (0, 0), fit=True)
    size = 0
    for y in range(heatmap.size.height):
        strip = heatmap.render_line(y)
        for line_filter in heatmap.get_line_filters():
            strip = strip.apply_filter(line_filter, heatmap.background_colors[1])
        size += len(strip.render(app.console))
    return size


def test_a_whole_new_frame_stays_within_its_budget(record_property: Any) -> None:
    async def run() -> list[float]:
        app = Alone()
        costs = []
        async with app.run_test(size=SIZE) as pilot:
            heatmap, frames = app.query_one(Heatmap), models(FRAMES)
            for model in frames:  # the tables of segments are made once, not in every frame
                paint(heatmap, model, app)
            await pilot.pause()
            for model in frames:
                began = time.process_time()
                assert paint(heatmap, replace(model), app) > 50_000
                costs.append((time.process_time() - began) * 1000)
        return costs

    costs = asyncio.run(run())
    record_property("median_ms", statistics.median(costs))
    print(f"\n94 x 512 on 200 x 50: median {statistics.median(costs):.1f} ms, "
          f"best {min(costs):.1f} ms a frame")  # fmt: skip
    assert statistics.median(costs) <= BUDGET_MS


def test_a_frame_in_which_one_layer_changed_costs_a_fraction_of_a_new_one() -> None:
    async def run() -> tuple[int, int]:
        app = Alone()
        async with app.run_test(size=SIZE) as pilot:
            heatmap, (first, _) = app.query_one(Heatmap), models(2)
            heatmap.show(first, (0, 0), fit=True)
            await pilot.pause()
            codes = first.codes.copy()
            codes[7, 3] = LIT * LEVELS
            refreshed: list[int] = []
            whole: list[int] = []
            heatmap.refresh_lines = lambda y, n=1: refreshed.append(n)  # type: ignore[method-assign]
            heatmap.refresh = lambda *a, **k: whole.append(1)  # type: ignore[method-assign, assignment, return-value]
            heatmap.show(replace(first, codes=codes), (0, 0), fit=True)
            return sum(refreshed), len(whole)

    assert asyncio.run(run()) == (1, 0)
