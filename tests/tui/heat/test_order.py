"""The map sorted by score, the page of one expert, and marks in half-block maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tests.tui.test_hints import state_after
from tui.heat.grid import BASE
from tui.heat.model import HEAT, LEVELS, PROTECTED, heat_model
from tui.heat.order import column, order_of, rectangle
from tui.heat.paint import DARK, LIGHT, HalfBlocks, half_colour, luma
from tui.input import actions, expert_selection
from tui.state.app_state import AppState
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.experts.expert_profile import dossier_page


def sorted_state() -> AppState:
    state = state_after("load demo", *CALIBRATED)
    return replace(state, heat=replace(state.heat, sort=True, metric="reap_sum"))


def test_sorted_columns_hold_falling_scores() -> None:
    state = sorted_state()
    model, order = heat_model(state), order_of(state)
    assert model is not None
    assert order is not None
    for row, experts in enumerate(order.tolist()):
        scores = state.view.heat.metrics["reap_sum"][row]
        assert experts == sorted(range(16), key=lambda e: (-scores[e], e))
    levels = model.codes % LEVELS
    seen = model.codes // LEVELS == HEAT
    assert all((np.diff(row[here]) <= 0).all() for row, here in zip(levels, seen, strict=True))


def test_pruned_experts_stand_last() -> None:
    state = sorted_state()
    heat = state.view.heat
    alive = heat.alive.copy()
    alive[:, 2] = False
    gone = replace(state, view=replace(state.view, heat=replace(heat, alive=alive)))
    assert set(order_of(gone)[:, -1].tolist()) == {2}


def test_on_a_sorted_map_the_cursor_moves_by_rank() -> None:
    state = sorted_state()
    order = order_of(state)
    state = replace(state, cursor=(1, int(order[1, 4])))
    assert actions.move(state, 0, 1).cursor == (1, order[1, 5])
    assert actions.move(state, 1, 0).cursor == (2, order[2, 4])
    assert actions.move(state, 0, 99).cursor == (1, order[1, 15])
    assert actions.move(state, 0, -99).cursor == (1, order[1, 0])
    assert actions.point(state, 3, 7).cursor == (3, order[3, 7])


def test_a_range_on_a_sorted_map_marks_what_is_between_on_the_screen() -> None:
    state = sorted_state()
    order = order_of(state)
    corners = ((1, int(order[1, 12])), (2, int(order[2, 14])))
    mask = rectangle(order, corners, (6, 16))
    assert [sorted(np.flatnonzero(row)) for row in mask[1:3]] == [
        sorted(order[1, 12:15]),
        sorted(order[2, 12:15]),
    ]
    assert mask.sum() == 6
    assert column(order, 1, int(order[1, 12])) == 12


def test_the_least_busy_of_all_layers_are_picked_with_two_keys() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("S", "end", "C", "space")
        order = order_of(shell.app.state)
        going = expert_selection.pruned_mask(shell.app.state)
        assert [np.flatnonzero(row).tolist() for row in going] == [[e] for e in order[:, -1]]

    drive(test)


def test_the_dossier_opens_for_the_key_and_not_for_the_typed_line() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("right", "W")
        assert shell.engine.lines[-1] == "dossier 0:1"
        shell.engine.finish()
        await shell.settle()
        assert isinstance(shell.app.screen, HelpScreen)
        await shell.press("escape")
        await shell.play("dossier 2:5")
        assert not isinstance(shell.app.screen, HelpScreen)

    drive(test)


def test_the_page_shows_figures_tokens_and_likeness_as_they_are() -> None:
    engine, seen = FakeEngine(), []
    engine.subscribe(seen.append)
    engine.play("load demo", *CALIBRATED, "dossier 2:5")
    state, report = AppState(view=engine.view()), seen[-1].report
    console = Console(width=70, color_system=None)
    with console.capture() as capture:
        console.print(dossier_page(report, state))
    page = capture.get()
    assert "layer 2, expert 5" in page
    assert "most similar expert of the layer: 8 (similarity 0.81" in page
    assert "'[b]fast[/b]'" in page
    assert "██████▎    4 of 6" in page  # above its share of all tokens
    assert "12.5% of 512 tokens" in page
    pointer = next(line for line in page.splitlines() if "▴" in line)
    order = np.argsort(-state.view.heat.metrics["reap_sum"][2], kind="stable").tolist()
    assert pointer.index("▴") == order.index(5)


@pytest.mark.parametrize("inks", [DARK, LIGHT])
def test_protected_experts_show_in_half_blocks(inks) -> None:
    for level in (0, LEVELS - 1):
        plain, shielded = (half_colour(inks, kind * LEVELS + level) for kind in (HEAT, PROTECTED))
        assert shielded != plain
        assert shielded[0] - shielded[2] > plain[0] - plain[2]  # warmer
    cold, hot = (half_colour(inks, PROTECTED * LEVELS + level) for level in (0, LEVELS - 1))
    assert abs(luma(cold) - luma(hot)) > 40  # still as light as its heat
    pair = (PROTECTED * LEVELS + 3) * BASE + PROTECTED * LEVELS + 9
    assert HalfBlocks(inks, 2)[pair].text == "◆◆"
