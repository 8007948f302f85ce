"""The screen as a whole: words, fields, cancelling, sizes, leaving."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from textual import events
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.events import Notice
from mlxfun.report import Report, TextReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell, drive, ready
from tui.app import ShellApp
from tui.command_history import LineHistory
from tui.state.app_state import Entry
from tui.widgets.command_line import CommandInput
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.transcript import Transcript
from tui.widgets.experts.heatmap import Heatmap
from tui.widgets.experts.legend import Legend
from tui.widgets.history import HistoryPanel, NodeList
from tui.widgets.log import Reports
from tui.widgets.plan import PlanPanel, plan_body
from tui.widgets.status import StatusLine
from tui.widgets.tabs import TabStrip


def text_of(shell: Shell, widget: type) -> str:
    """What a widget of lines shows, as plain text."""
    found = shell.app.main.query_one(widget)
    lines = [found.render_line(y).text.rstrip() for y in range(found.size.height)]
    return "\n".join(lines).rstrip()


def plan_text(shell: Shell) -> str:
    panel = shell.app.main.query_one(PlanPanel)
    return "\n".join(
        "".join(segment.text for segment in line).rstrip()
        for line in shell.app.console.render_lines(
            panel.query_one(Static).content,
            shell.app.console.options.update(width=60),
        )
    )


# The command line -----------------------------------------------------------------------------
def test_a_command_line_runs_and_its_answer_stands_above_it() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("colon", *"info", "enter")
        shell.engine.finish()
        await shell.settle()
        assert shell.engine.lines[-1] == "info"
        assert shell.echo == "✓ info done"

    drive(test)


def test_keys_that_come_all_at_once_are_taken_in_order() -> None:
    def typed(shell: Shell, text: str) -> None:
        named = {"\r": "enter", "\x15": "ctrl+u", ":": "colon"}
        for char in text:
            shell.app.post_message(events.Key(named.get(char, char), char))

    @ready()
    async def test(shell: Shell) -> None:
        typed(shell, ":history\x15info\r:layers\r")
        await shell.settle()
        shell.engine.finish()
        assert shell.engine.lines[-2:] == ["info", "layers"]
        await shell.press("1")
        typed(shell, "ione\rtwo\r")
        await shell.settle()
        assert shell.engine.lines[-2:] == ["chat one", "chat two"]

    drive(test)


def test_a_slip_comes_back_to_be_corrected_with_the_reason_above() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("colon", *"clapply", "enter")
        shell.engine.finish()
        await shell.settle()
        field = shell.app.main.query_one(CommandInput)
        assert field.value == "clapply"
        assert field.has_focus
        entry = shell.app.state.log[-1]
        assert (entry.level, entry.text) == (
            "error", "unknown command 'clapply'; did you mean 'collect'?",
        )  # fmt: skip

    drive(test)


def test_opened_with_a_colon_it_gives_the_focus_back() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert shell.app.main.query_one(Heatmap).has_focus
        await shell.press("colon", *"info", "enter")
        assert shell.app.main.query_one(Heatmap).has_focus
        await shell.press("6", *"info", "enter")
        assert shell.app.main.query_one(CommandInput).has_focus

    drive(test)


def test_tab_completes_and_goes_round_and_the_ghost_shows_the_first() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        field = shell.app.main.query_one(CommandInput)
        await shell.press("colon", *"pr")
        assert shell.echo.split()[0] == "prune"
        await shell.press("tab")
        assert field.value == "prune "
        await shell.press("tab")
        assert field.value == "preview "
        await shell.press("tab", "tab")
        assert field.value == "prune "
        await shell.press("shift+tab", "shift+tab")
        assert field.value == "preview "
        field.fill("collect --data")
        await shell.press("tab", *"demo:e", "tab")
        assert field.value == "collect --dataset demo:eval "

    drive(test)


def test_the_right_arrow_takes_the_ghost() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("colon", *"coll")
        await shell.pilot.pause(0.05)
        await shell.press("right")
        assert shell.app.main.query_one(CommandInput).value == "collect"

    drive(test)


def test_up_and_down_walk_the_lines_of_this_and_earlier_sessions(tmp_path: Path) -> None:
    file = tmp_path / "state" / "lines"
    file.parent.mkdir()
    file.write_text("layers\n\nstats show\n")

    @ready()
    async def test(shell: Shell) -> None:
        field = shell.app.main.query_one(CommandInput)
        await shell.press("6", *"info", "enter", *"dra", "up")
        assert field.value == "info"
        await shell.press("up", "up", "up", "up")
        assert field.value == "layers"
        await shell.press("down")
        assert field.value == "stats show"
        await shell.press("down", "down")
        assert field.value == "dra"

    drive(test, lines=file)
    assert file.read_text() == "layers\n\nstats show\ninfo\n"


def test_a_history_that_cannot_be_written_is_no_accident(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = LineHistory(tmp_path / "file" / "lines")
    assert history.load() == []
    history.add("info")
    assert (tmp_path / "file").read_text() == ""


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
        assert heading == "! a�]0;titleb"

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
        assert shell.app.main.query_one("#say Input").value == "a long question"  # type: ignore[attr-defined]
        assert "[load a model first]" in text_of(shell, Transcript)

    drive(test)


# Cancelling -----------------------------------------------------------------------------------
class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_two_escapes_cancel_and_one_only_asks() -> None:
    clock = Clock()

    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.press("escape")
        assert shell.engine.cancelled == 0
        assert shell.echo == "· esc again cancels: collect --dataset demo:mixed"
        clock.now += 5.0
        await shell.press("escape")
        assert shell.engine.cancelled == 0
        clock.now += 0.5
        await shell.press("escape")
        assert shell.engine.cancelled == 1

    drive(test, now=clock)


@pytest.mark.parametrize("where", ["1", "i", "colon"])
def test_control_c_cancels_from_anywhere(where: str) -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.press(where, "ctrl+c")
        assert shell.engine.cancelled == 1
        assert shell.app.is_running

    drive(test)


def test_leaving_in_the_middle_of_a_job_cancels_it_and_leaves() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        await shell.pilot.press("ctrl+q")

    shell = drive(test)
    assert shell.engine.cancelled == 1
    assert shell.app.return_code == 0


def test_quit_as_a_command_leaves() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.pilot.press("colon", *"quit", "enter")
        shell.engine.finish()
        await shell.pilot.pause()

    assert drive(test).app.return_code == 0


# Panels ---------------------------------------------------------------------------------------
def test_the_plan_says_what_goes_what_it_saves_and_how_to_decide() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        text = plan_text(shell)
        assert "24 experts go" in text
        assert "6.0 MiB → 5.0 MiB (-17%)" in text
        assert "not measured yet: press v" in text
        assert "7-10" in text
        await shell.play("preview")
        text = plan_text(shell)
        assert "perplexity 14.110 → 14.620 (1.036x)" in text
        assert "KL mean 0.0312, p99 0.410" in text
        assert "same next token 94.1%" in text

    drive(test)


def test_without_a_plan_the_panel_says_how_to_get_one() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert "Press c to calibrate" in plan_text(shell)
        await shell.play(*CALIBRATED)
        assert "Press p to stage a prune" in plan_text(shell)

    drive(test)


def test_the_history_marks_where_the_model_is_and_enter_goes_elsewhere() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        assert "● 1 prune --n-prune 4" in text_of(shell, NodeList)
        await shell.press("4", "up", "enter")
        assert shell.engine.lines[-1] == "goto 0"
        shell.engine.finish()
        await shell.settle()
        assert "● 0 load demo" in text_of(shell, NodeList)
        assert shell.app.main.query_one(HistoryPanel).selected == 0

    drive(test)


def test_reports_go_through_the_renderer() -> None:
    def render(report: Report) -> Text:
        return Text(f"<<{report.kind}>>")

    engine = FakeEngine()
    app = ShellApp(engine, renderer=render, clock=lambda: 0.0)

    async def run() -> str:
        async with app.run_test(size=(160, 45)) as pilot:
            shell = Shell(engine, app, pilot)
            await shell.play("load demo", "layers")
            return text_of(shell, Reports)

    import asyncio

    assert "✓ layers  0.4 s\n<<text>>" in asyncio.run(run())


def test_a_report_that_does_not_fit_is_shown_from_its_head() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        long = "\n".join(f"line {n}" for n in range(40))
        await shell.play("layers")
        entry = Entry("ok", "help", long, TextReport(long))
        shell.app._change(replace(shell.app.state, log=(*shell.app.state.log, entry), echo=entry))
        await shell.settle()
        assert text_of(shell, Reports).splitlines()[:2] == ["✓ help", "line 0"]
        assert shell.echo == "✓ help: see the reports (5)"
        await shell.play("layers")
        await shell.until(lambda: text_of(shell, Reports).splitlines()[-1] == "layers done")

    drive(test)


def test_a_report_is_shown_from_its_head_also_where_the_layout_comes_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early: list[bool] = []
    later = Reports.call_after_refresh

    def at_once_the_first_time(self: Reports, callback: Any, *args: Any) -> Any:
        if early:
            return later(self, callback, *args)
        early.append(True)
        return callback(*args)

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        long = "\n".join(f"line {n}" for n in range(40))
        entry = Entry("ok", "help", long, TextReport(long))
        monkeypatch.setattr(Reports, "call_after_refresh", at_once_the_first_time)
        shell.app._change(replace(shell.app.state, log=(*shell.app.state.log, entry), echo=entry))
        await shell.settle()
        assert early
        assert text_of(shell, Reports).splitlines()[:2] == ["✓ help", "line 0"]

    drive(test)


def test_reports_are_wrapped_again_when_the_terminal_changes() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("help")
        shell.engine.finish()
        wide = text_of(shell, Reports)
        await shell.pilot.resize_terminal(112, 40)
        await shell.settle()
        narrow = text_of(shell, Reports)
        assert "top-2" in wide
        assert narrow != wide
        assert max(len(line) for line in narrow.splitlines()) <= 45

    drive(test)


def test_the_status_line_tells_job_rate_and_time_left() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.run("info")
        shell.engine.step(3)
        await shell.settle()
        text = str(shell.app.main.query_one(StatusLine).visual)
        assert "8/32 samples 4 samples/s ETA 6 s" in text
        assert "1 queued" in text

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


def test_a_plan_in_which_everybody_stays_says_what_it_changes_in_its_own_words() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        view = shell.app.state.view
        assert view.plan is not None
        none = dict.fromkeys(view.plan.pruned, ())
        plan = replace(view.plan, technique="bake", pruned=none, mass_lost=None)
        text = Console(width=80, record=True, file=StringIO())
        text.print(plan_body(replace(view, plan=plan)))
        said = text.export_text()
        assert "staged bake" in said
        assert "work lost" not in said
        assert "(-" not in said

    drive(test)


def test_leaving_with_unsaved_edits_is_asked_once() -> None:
    @ready(*APPLIED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert shell.app.is_running
        assert shell.echo == "! the edits are not saved: s saves, ^q again leaves"
        await shell.play("save out")
        shell.app._leaving = float("-inf")
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_a_staged_plan_is_not_left_behind_by_accident_and_twice_is_an_answer() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert "a plan is staged and not applied" in shell.echo
        assert shell.app.is_running
        await shell.pilot.press("ctrl+q")

    assert drive(test).app.return_code == 0


def test_several_pasted_lines_become_one_and_none_is_lost() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("i")
        shell.app.focused.post_message(events.Paste("first line\n  second line\n\nthird"))
        await shell.settle()
        assert shell.app.focused.value == "first line second line third"
        assert shell.echo == "· 3 lines were pasted as one"

    drive(test)


def test_the_reason_for_a_refused_line_stays_until_the_line_is_touched() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("colon", *"colle", "enter")
        shell.engine.finish()
        await shell.settle()
        assert shell.app.main.command.input.value == "colle"
        refused = shell.echo
        assert refused.startswith("✗ ")
        await shell.press("c")
        assert shell.echo != refused

    drive(test)


def test_a_message_that_does_not_fit_says_where_it_is_whole() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.engine._emit(Notice("warning", "a long tale " * 12))
        await shell.settle()
        assert shell.echo.endswith("… (5)")
        shell.engine._emit(Notice("warning", "a short one"))
        await shell.settle()
        assert shell.echo == "! a short one"

    drive(test, size=(80, 24))


def test_the_words_about_an_expert_come_before_the_legend() -> None:
    @ready(*CALIBRATED, "steer --level 2:5=1.5")
    async def test(shell: Shell) -> None:
        assert shell.app.main.query_one(Legend).display
        shell.app.state = replace(shell.app.state, cursor=(2, 5))
        shell.app._show()
        await shell.settle()
        words = str(shell.app.main.query_one("#words").visual)
        assert "raised by 1.5" in words
        assert words.endswith("% of its layer")
        assert not shell.app.main.query_one(Legend).display

    drive(test, size=(80, 24))
