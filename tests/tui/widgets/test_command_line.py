"""The command line: completion, history, echo, pasting."""

from __future__ import annotations

from pathlib import Path

from textual import events

from mlxfun.events import Notice
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tui.command_history import LineHistory
from tui.widgets.command_line import LineInput
from tui.widgets.experts.heatmap import Heatmap


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
        await shell.press("escape", "1")
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
        field = shell.app.main.query_one(LineInput)
        assert field.value == "clapply"
        assert field.has_focus
        entry = shell.app.state.log[-1]
        assert (entry.level, entry.text) == (
            "error", "unknown command 'clapply'; did you mean 'collect'?",
        )  # fmt: skip

    drive(test)


def test_the_focus_stays_where_it_was_put_whether_a_line_succeeds_or_fails() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        line = shell.app.main.query_one(LineInput)
        await shell.press("colon", *"info", "enter")
        assert line.has_focus, "letters that follow are no keys"
        await shell.press(*"undo", "enter")
        shell.engine.finish()
        await shell.settle()
        assert line.has_focus
        assert line.value == "undo", "a line that failed is kept"
        await shell.press("escape")
        assert shell.app.main.query_one(Heatmap).has_focus

    drive(test)


def test_a_key_that_offers_a_line_has_the_focus_back_after_it() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("c", "enter")
        assert shell.app.main.query_one(Heatmap).has_focus
        await shell.press("colon", "enter")
        assert shell.app.main.query_one(Heatmap).has_focus, "an empty line leaves"

    drive(test)


def test_up_recalls_the_lines_that_begin_as_this_one_does() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        field = shell.app.main.query_one(LineInput)
        await shell.press("colon")
        for line in ("prune --n-prune 2", "info", "prune --n-prune 3", "layers"):
            await shell.press(*[{" ": "space", "-": "minus"}.get(c, c) for c in line], "enter")
        await shell.press(*"pr", "up")
        assert field.value == "prune --n-prune 3"
        await shell.press("up")
        assert field.value == "prune --n-prune 2"
        await shell.press("down", "down")
        assert field.value == "pr"

    drive(test)


def test_earlier_lines_are_searched_for_words_in_any_order() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("colon")
        for line in ("prune --n-prune 2", "info", "prune --n-prune 3"):
            await shell.press(*[{" ": "space", "-": "minus"}.get(c, c) for c in line], "enter")
        await shell.press("ctrl+r")
        await shell.press("2", "space", "p", "r", "enter")
        assert shell.app.main.query_one(LineInput).value == "prune --n-prune 2"
        assert shell.app.main.query_one(LineInput).has_focus

    drive(test)


def test_code_that_is_pasted_into_the_chat_keeps_its_lines() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        code = "def area(r):\n    return 3 * r\n"
        await shell.press("i")
        shell.app.focused.post_message(events.Paste(code))
        await shell.press(*"so", "ctrl+j", "x", "enter")
        assert shell.engine.lines[-1] == f"chat '{code}so\nx'"

    drive(test)


def test_the_length_of_a_long_paste_is_told_before_it_is_sent() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("i")
        shell.app.focused.post_message(events.Paste("word " * 400))
        await shell.settle()
        assert shell.engine.lines[-1].startswith("tokens 'word word")
        shell.engine.finish()
        await shell.settle()
        assert shell.echo == "· in the field: 400 tokens; the model's context holds 512"
        assert "tokens 'word" not in shell.screen

    drive(test)


def test_tab_completes_and_goes_round_and_the_ghost_shows_the_first() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        field = shell.app.main.query_one(LineInput)
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
        assert shell.app.main.query_one(LineInput).value == "collect"

    drive(test)


def test_up_and_down_walk_the_lines_of_this_and_earlier_sessions(tmp_path: Path) -> None:
    file = tmp_path / "state" / "lines"
    file.parent.mkdir()
    file.write_text("layers\n\nstats show\n")

    @ready()
    async def test(shell: Shell) -> None:
        field = shell.app.main.query_one(LineInput)
        await shell.press("6", *"info", "enter", "up")
        assert field.value == "info"
        await shell.press("up", "up", "up", "up")
        assert field.value == "layers"
        await shell.press("down")
        assert field.value == "stats show"
        await shell.press("down", "down")
        assert field.value == ""

    drive(test, lines=file)
    assert file.read_text() == "layers\n\nstats show\ninfo\n"


def test_a_history_that_cannot_be_written_is_no_accident(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = LineHistory(tmp_path / "file" / "lines")
    assert history.load() == []
    history.add("info")
    assert (tmp_path / "file").read_text() == ""


def test_several_pasted_lines_become_one_and_none_is_lost() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("i")
        shell.app.focused.post_message(events.Paste("first line\n  second line\n\nthird"))
        await shell.settle()
        assert shell.app.focused.value == "first line\n  second line\n\nthird"

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


def test_a_refused_line_is_replaced_by_what_is_typed_and_corrected_by_backspace() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        line = shell.app.main.command.input
        shell.app.main.command.give_back("prun", focus=True)
        await shell.press(*"undo")
        assert line.value == "undo"
        shell.app.main.command.give_back("undoo", focus=True)
        await shell.press("backspace")
        assert line.value == "undo"
        await shell.press("backspace")
        assert line.value == "und"
        shell.app.main.command.give_back("prun", focus=False)
        shell.app.main.leave_field()
        await shell.press("colon", "x")
        assert line.value == "x"

    drive(test)
