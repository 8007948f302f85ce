"""Where experts are, on the heatmap: in memory, on disk, just read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxfun.events import JobEnded, JobStarted, ResidencyFrame
from mlxfun.report import TextReport
from tests.tui.driving import CALIBRATED, Shell, drive, ready, text_of
from tests.tui.heat.test_heat import SCORES, kinds, model_of, view
from tui.heat.model import ABSENT, CONDEMNED, HEAT, LEVELS, LIT, LOADED, PRUNED, UNSEEN
from tui.heat.paint import DARK, LIGHT, Blocks, HeatColours, luma, ramp_colour
from tui.heat.words import explain
from tui.widgets.experts.legend import Legend


def test_experts_on_disk_are_dim_and_those_just_read_are_marked() -> None:
    held = np.array([[0, 1, 2, 0], [0, 1, 0, 2]], np.int8)
    heat = replace(view(SCORES, condemned=[(1, 0)], pruned=[(1, 2)]), held=held)
    assert kinds(model_of(heat)) == [
        [ABSENT, HEAT, LOADED, ABSENT],
        [CONDEMNED, UNSEEN, PRUNED, LOADED],
    ]
    # They keep their heat, so that the hot ones among them can be told.
    assert model_of(heat).codes[0, 0] % LEVELS == model_of(view(SCORES)).codes[0, 0] % LEVELS
    assert "on disk" in explain(model_of(heat), (0, 0))
    assert "on disk" not in explain(model_of(heat), (0, 1))
    # What a running job says is newer, and an expert that was read for a token is lit as such.
    newer = np.array([[1, 1, 2, 1], [1, 1, 1, 1]], np.int8)
    lit = np.array([[1, 2], [3, 0]], np.int32)
    assert kinds(model_of(heat, held=newer, lit=lit)) == [
        [HEAT, LIT, LOADED, UNSEEN],
        [LIT, UNSEEN, PRUNED, LIT],
    ]


@pytest.mark.parametrize("inks", [DARK, LIGHT])
def test_where_an_expert_is_can_be_told_from_its_colour_and_its_sign(inks: HeatColours) -> None:
    hot = LEVELS - 1
    shades = [ramp_colour(inks, kind, hot) for kind in (HEAT, ABSENT, LOADED, LIT, PRUNED)]
    assert len(set(shades)) == len(shades)
    towards = abs(luma(ramp_colour(inks, ABSENT, hot)) - luma(inks.ground))
    assert towards < 0.6 * abs(luma(ramp_colour(inks, HEAT, hot)) - luma(inks.ground))
    marked = Blocks(inks, 3, marked=True)
    signs = [marked[kind * LEVELS].text for kind in (HEAT, ABSENT, LOADED, UNSEEN, PRUNED)]
    assert len(set(signs)) == len(signs)


def test_the_screen_shows_experts_coming_and_going() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        heat = shell.engine._view.heat
        assert heat is not None
        held = np.zeros(heat.alive.shape, np.int8)
        held[:, :2] = 1
        held[:, 2] = 2
        shell.engine._emit(JobStarted(90, "chat hi"))
        shell.engine._emit(ResidencyFrame(90, held))
        await shell.settle()
        legend = text_of(shell, Legend)
        assert "on disk" in legend
        assert "just read" in legend
        shell.engine._emit(JobEnded(90, "chat hi", TextReport("fine"), None, 0.1, ""))
        await shell.settle()
        assert "on disk" not in text_of(shell, Legend)  # the session says that all is in memory

    drive(test)
