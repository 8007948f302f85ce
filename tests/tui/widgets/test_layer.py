"""The page of one layer: between the map and an expert's dossier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tests.tui.test_hints import state_after
from tui.heat.layer import layer_model, share_of
from tui.heat.model import CONDEMNED, DOWN, PRUNED, UP, heat_model
from tui.input import expert_selection
from tui.state.app_state import AppState
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.experts.layer import LayerView


def page(state: AppState, position: int):
    model = heat_model(state)
    assert model is not None
    return layer_model(model, position)


def lines(shell: Shell) -> list[str]:
    view = shell.app.main.query_one(LayerView)
    return [view.render_line(y).text.rstrip() for y in range(view.size.height)]


def test_cutting_at_an_expert_costs_its_work_and_that_of_all_less_busy_ones() -> None:
    values = np.array([4.0, 1.0, 3.0, 0.0, 2.0, 9.0])
    alive = np.array([True, True, True, True, True, False])
    shares, below = share_of(values, alive)
    for expert, value in enumerate(values):
        quieter = [v for v, lives in zip(values, alive, strict=True) if lives and v <= value]
        wanted = sum(quieter) / 10 if alive[expert] else 0.0
        assert below[expert] == pytest.approx(wanted)
    assert shares.tolist() == [0.4, 0.1, 0.3, 0.0, 0.2, 0.0]


@pytest.mark.parametrize("sort", [False, True])
def test_every_expert_keeps_its_own_sign_however_the_page_is_sorted(sort: bool) -> None:
    state = state_after("load demo", *STAGED, "steer --activate 1:2 --deactivate 1:9")
    alive = state.view.heat.alive.copy()
    alive[1, 3] = False
    view = replace(state.view, heat=replace(state.view.heat, alive=alive))
    state = replace(state, view=view, heat=replace(state.heat, sort=sort))
    model = page(state, 1)
    named = {int(e): int(model.kinds[e]) for e in model.rows}
    assert (named[2], named[9], named[3]) == (UP, DOWN, PRUNED)
    condemned = set(np.flatnonzero(view.heat.condemned[1]).tolist()) - {2, 9, 3}
    assert {e for e, kind in named.items() if kind == CONDEMNED} == condemned
    if sort:
        shares = model.shares[model.rows]
        assert (np.diff(shares) <= 0).all()


def test_the_summary_counts_who_does_the_work() -> None:
    state = state_after("load demo", *STAGED)
    model = page(state, 2)
    work = np.sort(state.view.heat.metrics["reap_sum"][2])[::-1]
    part = np.cumsum(work) / work.sum()
    half, most = (next(n for n, p in enumerate(part, 1) if p >= x) for x in (0.5, 0.9))
    assert f"{half} of 16 experts have 50 % of the activations, {most} have 90 %" in model.summary
    gone = state.view.heat.condemned[2]
    lost = state.view.heat.metrics["reap_sum"][2][gone].sum() / work.sum()
    assert f"{int(gone.sum())} to prune with {lost:.1%}" in model.summary


def test_enter_goes_from_map_to_layer_to_expert_and_escape_all_the_way_back() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("down", "enter")
        assert "layer 1 · " in lines(shell)[0]
        await shell.press("down", "down", "enter")
        assert shell.engine.lines[-1] == "dossier 1:2"
        shell.engine.finish()
        await shell.settle()
        assert isinstance(shell.app.screen, HelpScreen)
        await shell.press("escape")
        assert "layer 1" in lines(shell)[0]
        await shell.press("escape")
        assert shell.app.state.heat.shape == "map"
        assert shell.app.main.focused_panel == "experts"

    drive(test)


def test_the_arrows_lead_to_other_experts_and_other_layers() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        state = lambda: shell.app.state.cursor  # noqa: E731
        await shell.press("enter", "down", "down", "right")
        assert state() == (1, 2)
        await shell.press("pagedown")
        assert state() == (1, 10)
        await shell.press("end")
        assert state() == (1, 15)
        await shell.press("home", "left")
        assert state() == (0, 0)

    drive(test)


def test_the_expert_under_the_cursor_is_always_on_screen() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("enter", "end")
        shown = [line for line in lines(shell) if line.lstrip().startswith("▸")]
        assert len(shown) == 1
        assert "E15" in shown[0]
        await shell.press("home")
        assert "▸" in lines(shell)[2]

    drive(test, size=(80, 24))


def test_a_range_of_lines_is_picked_as_on_the_map() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("right", "down", "enter", "shift+down", "shift+down")
        assert [line.split()[0] for line in lines(shell)[2:6]] == ["E0", "┃", "┃", "▸"]
        await shell.press("space")
        mask = expert_selection.pruned_mask(shell.app.state)
        assert {tuple(map(int, cell)) for cell in np.argwhere(mask)} == {(1, 1), (1, 2), (1, 3)}

    drive(test)


def test_a_click_puts_the_cursor_on_a_line() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("enter")
        await shell.pilot.click(LayerView, offset=(4, 2 + 5))
        assert shell.app.state.cursor == (0, 5)

    drive(test)


def test_what_works_this_instant_shows_while_text_runs_through() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("enter")
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(3)
        await shell.settle()
        first = lines(shell)
        shell.engine.step(2)
        await shell.settle()
        assert lines(shell)[2:] != first[2:]
        assert any("█" in line for line in first[2:])

    drive(test)
