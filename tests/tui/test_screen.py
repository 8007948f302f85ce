"""The screen as a whole: words, fields, cancelling, sizes, leaving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widget import Widget

from mlxfun.report import TextReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready, text_of
from tui.app import ShellApp
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.transcript import Transcript
from tui.widgets.experts.heatmap import Heatmap
from tui.widgets.log import Reports
from tui.widgets.tabs import TabStrip


# The chat -------------------------------------------------------------------------------------
def test_what_is_said_is_sent_word_for_word() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("i", *"it's [b]", "enter")
        assert shell.engine.lines[-1] == """chat 'it'"'"'s [b]'"""

    drive(test)


def test_markup_and_control_characters_of_a_user_stay_text() -> None:
    @ready("chat '[bold]a[/bold] [@click=app.quit]x[/]'")
    async def test(shell: Shell) -> None:
        assert "› [bold]a[/bold] [@click=app.quit]x[/]" in text_of(shell, Transcript)
        assert "[@click=app.quit]" in text_of(shell, Reports)
        shell.engine.notice("warning", "[red]no[/red]")
        await shell.settle()
        assert shell.echo == "! [red]no[/red]"
        shell.engine.notice("warning", "a\x1b]0;title\x07b")
        await shell.settle()
        heading = text_of(shell, Reports).splitlines()[-1]
        assert heading == "! a␛]0;titleb"

    drive(test)


def test_an_answer_grows_token_by_token() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("chat hello")
        shell.engine.step(3)
        await shell.settle()
        assert text_of(shell, Transcript) == "› hello\n▎ An expert"
        shell.engine.finish()
        await shell.settle()
        assert text_of(shell, Transcript) == "› hello\n▎ An expert is a small network."

    drive(test)


def test_a_long_conversation_follows_its_end() -> None:
    @ready(*[f"chat 'question {n}'" for n in range(30)])
    async def test(shell: Shell) -> None:
        transcript = shell.app.main.query_one(Transcript)
        for _ in range(40):  # it scrolls once its new size is known, a refresh or two later
            if transcript.scroll_offset.y == transcript.max_scroll_y > 0:
                break
            await shell.pilot.pause(0.05)
        assert transcript.scroll_offset.y == transcript.max_scroll_y > 0
        assert "question 29" in text_of(shell, Transcript)

    drive(test)


def test_escape_in_the_chat_stops_the_answer_at_once() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("i", *"hello", "enter")
        shell.engine.step(4)
        await shell.settle()
        await shell.press("escape")
        assert shell.engine.cancelled == 1
        shell.engine.finish()
        await shell.settle()
        turn = shell.app.state.turns[-1]
        assert (turn.text, turn.note) == ("An expert is", "stopped")

    drive(test)


def test_a_text_that_failed_goes_back_to_its_field() -> None:
    async def test(shell: Shell) -> None:
        shell.engine._waiting.clear()
        shell.engine.run("chat 'a long question'")
        shell.engine.finish()
        await shell.settle()
        assert shell.app.main.query_one("#say ChatInput").value == "a long question"  # type: ignore[attr-defined]
        assert "[load a model first]" in text_of(shell, Transcript)

    drive(test)


def test_a_long_job_calls_back_whoever_turned_away() -> None:
    bells: list[int] = []

    @ready()
    async def test(shell: Shell) -> None:
        shell.app.bell = lambda: bells.append(1)  # type: ignore[method-assign]
        await shell.play("info")
        assert bells == []
        written: list[str] = []
        assert shell.app._driver is not None
        shell.app._driver.write = written.append  # type: ignore[method-assign]
        await shell.play("collect --dataset demo:mixed")
        assert bells == [1]
        called = [text for text in written if text.startswith("\x1b]9;")]
        assert len(called) == 1
        assert called[0].startswith("\x1b]9;collect --dataset demo:mixed: ")
        assert not shell.app._notifications, "a toast covers the line that is being typed"

    drive(test)


@pytest.mark.parametrize("size", [(160, 45), (80, 24), (60, 18)])
def test_a_frame_in_which_nothing_changed_paints_nothing(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        shell.engine.run("chat hello")
        shell.engine.step(3)
        await shell.settle()
        painted: list[str] = []
        plain = Widget.refresh

        def spy(self: Widget, *regions: Any, **options: Any) -> Widget:
            painted.append(type(self).__name__)
            return plain(self, *regions, **options)

        monkeypatch.setattr(Widget, "refresh", spy)
        for _ in range(3):
            shell.app._show()
        assert painted == []
        shell.engine.step()
        shell.app.pump()
        assert {"Transcript", "Heatmap"} & set(painted)

    drive(test, size=size)


# Small terminals ------------------------------------------------------------------------------
def visible(shell: Shell) -> list[str]:
    return [p.panel for p in shell.app.main.query("Panel") if p.display]  # type: ignore[attr-defined]


def test_on_small_terminals_the_outcome_of_a_command_comes_to_the_front() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        assert visible(shell) == ["experts", "chat"]
        await shell.play("prune --n-prune 4")
        assert visible(shell) == ["experts", "plan"]
        await shell.play("layers")
        assert visible(shell) == ["experts", "log"]
        await shell.play("apply")
        assert visible(shell) == ["experts", "history"]
        await shell.play("chat hello")
        assert visible(shell) == ["experts", "chat"]
        assert shell.app.main.query_one(Heatmap).has_focus

    drive(test, size=(80, 24))


def test_a_step_of_the_history_takes_the_heatmap_from_nobody() -> None:
    @ready(*STAGED, "apply")
    async def test(shell: Shell) -> None:
        await shell.press("1")
        await shell.play("undo")
        assert visible(shell) == ["experts"]

    drive(test, size=(60, 18))


def test_a_tab_can_be_clicked() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        strip = shell.app.main.query_one(TabStrip)
        place = str(strip.visual).index("4 history")
        await shell.pilot.click(TabStrip, offset=(place + 2, 0))
        await shell.settle()
        assert visible(shell) == ["experts", "history"]
        assert shell.app.main.focused_panel == "history"

    drive(test, size=(80, 24))


def test_the_terminal_may_change_its_size_at_any_time() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        shell.engine.run("chat hello")
        for size in [(60, 18), (200, 50), (20, 6), (80, 24), (1, 1), (160, 45), (110, 30)]:
            shell.engine.step()
            await shell.pilot.resize_terminal(*size)
            await shell.settle()
        assert visible(shell) == ["experts", "chat", "plan", "history", "log"]

    drive(test)


def test_a_panel_that_leaves_the_screen_hands_its_focus_on() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("5")
        await shell.pilot.resize_terminal(60, 18)
        await shell.settle()
        assert visible(shell) == ["log"]
        await shell.play("prune --n-prune 2")
        assert visible(shell) == ["plan"]
        assert shell.app.main.focused_panel == "plan"

    drive(test)


def test_zoom_gives_the_focused_panel_everything_and_takes_it_back() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("3", "z")
        assert visible(shell) == ["plan"]
        await shell.press("z")
        assert len(visible(shell)) == 5
        await shell.press("i")
        assert shell.app.main.query_one(ChatPanel).query_one(Transcript) is not None

    drive(test)


# Leaving --------------------------------------------------------------------------------------
def test_run_hands_its_wishes_to_the_application(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tui import app as module

    seen: list[ShellApp] = []

    def note(self: ShellApp) -> int:
        seen.append(self)
        return 3

    monkeypatch.setattr(module.ShellApp, "run", note)
    monkeypatch.setenv("SSH_CONNECTION", "here there")
    engine = FakeEngine()
    assert module.run(engine, startup_lines=["load demo"], lines_file=tmp_path / "lines") == 3
    assert seen[0]._startup_lines == ("load demo",)
    assert seen[0]._frame_seconds == 0.25


def test_the_default_renderer_is_that_of_the_commands() -> None:
    from commands.output.render.dispatch import render
    from tui.app import full_report

    assert str(full_report(TextReport("[b]as it is[/b]"))) == "[b]as it is[/b]"
    assert type(full_report(TextReport("x"))) is type(render(TextReport("x")))


def test_a_text_report_needs_no_renderer() -> None:
    from tui.app import plain_report

    assert str(plain_report(TextReport("[b]as it is[/b]"))) == "[b]as it is[/b]"
