"""The panel of the server: what it tells, its keys, and the map that lights up by the traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlxfun.serving.ask import Figures
from mlxfun.serving.snapshot import ClientLine, Problem, RequestLine, ServingReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, Shell, drive, make, still
from tui.layout import arrange
from tui.state import serving
from tui.state.app_state import AppState
from tui.widgets.serve import head, request_line, totals


def request(number: int, **more: Any) -> RequestLine:
    line = RequestLine(number, "openai/2.1", "base", False, False, 400, 300, 37, 12.34, 3.0)
    return replace(line, **more)


def lit(*experts: int) -> Any:
    """Each layer of the fake model routes a token to these."""
    return np.array([list(experts)] * 6, dtype=np.int32)


SERVED = ServingReport(
    address="127.0.0.1:8080",
    doing="open",
    requests=(request(7), request(8, client="claude-cli/1", side="candidate"),
              request(9, waiting=True, generated=0, rate=0.0)),
    clients=(ClientLine("openai/2.1", 5, 1, 900, 450, 1234), ClientLine("claude-cli/1", 2)),
    problems=(Problem("openai/2.1", 400, "temperature must be a number, not 'x'", 0.0),),
    figures=Figures(in_flight=2, waiting=1, prompt_tokens=900, cached_tokens=450),
    rate=45.6,
    lit={7: lit(1, 2), 8: lit(2, 5)},
)  # fmt: skip


def served(report: ServingReport = SERVED) -> FakeEngine:
    engine = FakeEngine()
    engine.served = report
    return engine


class Clock:
    """Each look at it takes a second, so that the server is looked at each time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def watched(test: Any, size: tuple[int, int] = (120, 40)) -> Shell:
    async def prepared(shell: Shell) -> None:
        await shell.play(*CALIBRATED)
        await test(shell)

    return drive(prepared, engine=served(), size=size, now=Clock())


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_panel_tells_requests_clients_and_errors(size: tuple[int, int]) -> None:
    async def test(shell: Shell) -> None:
        await shell.press("8")
        shown = shell.screen
        assert "http://127.0.0.1:8080/v1  46 tokens/s" in shown
        assert "2 in flight, 1 waiting, 50% of prompts" in shown
        for word in ("   7 openai/2.1", "12.3/s", "claude-cli/1", "waiting 3 s"):
            assert word in shown, word
        if size[1] > 30:
            assert "5 requests, 1 failed, " in shown
            assert "400 openai/2.1: temper" in shown

    watched(test, size)


def test_the_map_lights_up_by_all_or_by_one() -> None:
    async def test(shell: Shell) -> None:
        assert set(shell.app.state.lit[0]) == {1, 2, 5}
        await shell.press("8", "down", "enter")
        assert shell.app.state.spotlight == 8
        await shell.settle()
        assert set(shell.app.state.lit[0]) == {2, 5}
        assert "◆    8" in shell.screen
        shell.engine.served = replace(SERVED, lit={8: lit(3, 4)})
        await shell.settle()
        assert set(shell.app.state.lit[0]) == {3, 4}
        assert shell.app.state.traffic.sum() == 2 * 2 * 6
        await shell.press("enter")
        assert shell.app.state.spotlight is None
        assert "all requests" in shell.echo

    watched(test)


def test_the_keys_hold_back_refuse_and_offer_to_stop() -> None:
    async def test(shell: Shell) -> None:
        await shell.press("8", "space", "D")
        assert shell.engine.lines[-2:] == ["serve pause", "serve drain"]
        shell.engine.served = replace(SERVED, doing="paused")
        await shell.settle()
        assert "paused" in shell.screen
        await shell.press("space")
        assert shell.engine.lines[-1] == "serve resume"
        await shell.press("K")
        assert shell.app.main.command.input.value == "serve stop"
        assert "serve stop" not in shell.engine.lines

    watched(test)


def test_without_a_server_there_is_no_panel() -> None:
    async def test(shell: Shell) -> None:
        await shell.press("8")
        assert "nothing is served" in shell.echo
        assert "serving" not in shell.app.main.focused_panel

    drive(test)
    state = AppState()
    sizes = ((120, 40), (80, 24), (60, 18))
    assert all("serve" not in arrange(*size, state).tabs for size in sizes)
    with_server = replace(state, view=replace(state.view, serving="127.0.0.1:1"), upper="serve")
    assert "serve" in arrange(120, 40, with_server).visible
    assert "serve" in arrange(80, 24, with_server).tabs


def test_a_request_that_has_ended_gives_the_light_back() -> None:
    state = replace(AppState(), serving=SERVED, spotlight=8)
    gone = serving.taken(state, replace(SERVED, requests=(request(7),)))
    assert gone.spotlight is None


def test_what_clients_call_themselves_does_not_drive_the_terminal() -> None:
    bad = "evil\x1b]0;x\x07\nname"
    text = request_line(request(1, client=bad), False, 100).plain
    text += totals(replace(SERVED, clients=(ClientLine(bad),))).plain
    assert "\x1b" not in text
    assert "\x07" not in text
    assert head(SERVED).plain.count("\n") == 1


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
def test_a_picture(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    monkeypatch.setenv("TZ", "UTC")
    engine = served()
    app = make(engine, now=Clock())
    app.animation_level = "none"

    async def prepare(pilot: Any) -> None:
        await pilot.pause()
        engine.finish()
        engine.play(*CALIBRATED)
        await pilot.press("8")
        await still(app, pilot)

    assert snap_compare(app, terminal_size=size, run_before=prepare)
