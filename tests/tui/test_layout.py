"""Which panels a terminal of a given size shows."""

from __future__ import annotations

import pytest

from tui.layout import PANELS, arrange
from tui.state.app_state import AppState


def test_a_big_terminal_shows_everything_and_needs_no_tabs() -> None:
    plan = arrange(160, 45, AppState())
    shown = ("experts", "chat", "plan", "history", "log")
    assert (plan.mode, plan.visible, plan.tabs) == ("wide", shown, ())
    mixing = arrange(160, 45, AppState(upper="mixer"))
    assert mixing.visible == ("experts", "chat", "history", "log", "mixer")


def test_80x24_shows_the_experts_and_one_other_panel() -> None:
    plan = arrange(80, 24, AppState(panel="plan", beside="plan", front="plan"))
    assert (plan.mode, plan.visible) == ("split", ("experts", "plan"))
    assert plan.tabs == ("chat", "plan", "history", "log", "mixer")


def test_going_to_the_experts_keeps_the_panel_beside_them() -> None:
    plan = arrange(80, 24, AppState(panel="experts", beside="history", front="experts"))
    assert plan.visible == ("experts", "history")


def test_60x18_shows_one_panel_at_a_time() -> None:
    plan = arrange(60, 18, AppState(front="log"))
    assert (plan.mode, plan.visible, plan.tabs) == ("single", ("log",), PANELS[:-1])  # no server


@pytest.mark.parametrize("size", [(160, 45), (80, 24), (60, 18)])
def test_a_zoomed_panel_has_the_screen_to_itself(size: tuple[int, int]) -> None:
    plan = arrange(*size, AppState(panel="plan", zoomed=True))
    assert (plan.mode, plan.visible) == ("single", ("plan",))


@pytest.mark.parametrize("width", [1, 20, 109, 110, 300])
@pytest.mark.parametrize("height", [1, 10, 21, 22, 29, 30, 100])
def test_every_size_shows_at_least_one_panel(width: int, height: int) -> None:
    assert arrange(width, height, AppState()).visible
