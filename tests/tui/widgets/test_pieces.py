"""Small pure parts of widgets, the palette, and the examples in docstrings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.events import Progress
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui import hints, palette
from tui.keys.keymap import KEYS
from tui.screen import MainScreen
from tui.state.app_state import AppState, Job
from tui.state.chat_turns import Turn
from tui.text import tree
from tui.widgets.conversation.transcript import turn_lines
from tui.widgets.dialogs.form import FormScreen
from tui.widgets.dialogs.help import HelpScreen, topic
from tui.widgets.keybar import bar_text
from tui.widgets.status import job_text, status_text


# History --------------------------------------------------------------------------------------
def history(*parents: int | None, current: int = 0) -> HistoryReport:
    nodes = tuple(
        HistoryNode(number, parent, f"edit {number}", "abc", 0)
        for number, parent in enumerate(parents)
    )
    return HistoryReport(nodes, current, 0, None)


def drawn(report: HistoryReport) -> list[str]:
    return [f"{lead}{node.id}" for lead, node in tree(report)]


def test_a_plain_series_of_edits_stands_in_one_column() -> None:
    assert drawn(history(None, 0, 1, 2)) == ["0", "1", "2", "3"]


def test_an_edit_after_an_undo_starts_a_branch() -> None:
    assert drawn(history(None, 0, 0, 1, 1)) == ["0", "├─1", "│ ├─3", "│ └─4", "└─2"]


def test_a_series_inside_a_branch_stays_under_its_branch() -> None:
    assert drawn(history(None, 0, 0, 2, 1)) == ["0", "├─1", "│ 4", "└─2", "  3"]


def test_a_very_long_history_is_drawn() -> None:
    deep = history(None, *range(5000))
    assert len(tree(deep)) == 5001


# Chat -----------------------------------------------------------------------------------------
def shown(turn: Turn, width: int = 30) -> list[str]:
    console = Console(width=width, color_system=None)
    return ["".join(s.text for s in line).rstrip() for line in turn_lines(turn, width, console)]


def test_long_answers_are_wrapped_and_marked_at_every_line() -> None:
    turn = Turn(1, "why?", "one two three four five six seven", "base")
    assert shown(turn, 20) == ["› why?", "▎ one two three four", "▎ five six seven", ""]


def test_markdown_is_rendered_only_when_the_answer_is_complete() -> None:
    growing = Turn(1, "q", "- **a**\n- b", "base")
    assert shown(growing) == ["› q", "▎ - **a**", "▎ - b", ""]
    assert shown(replace(growing, done=True)) == ["› q", "▎  • a", "▎  • b", ""]


def test_plain_answers_keep_their_line_breaks() -> None:
    turn = Turn(1, "q", "one\ntwo\n\nthree", "base", done=True)
    assert shown(turn) == ["› q", "▎ one", "▎ two", "▎", "▎ three", ""]


def test_an_answer_that_is_awaited_says_so_and_one_that_failed_says_why() -> None:
    assert shown(Turn(1, "q")) == ["› q", "  ...", ""]
    assert shown(Turn(1, "q", note="no model", done=True))[-2] == "  [no model]"


def test_wide_characters_never_make_a_line_too_long() -> None:
    turn = Turn(1, "日本語" * 10, "漢字" * 30, "base")
    console = Console(width=30)
    for line in turn_lines(turn, 30, console):
        assert sum(segment.cell_length for segment in line) <= 30


# Status and keys ------------------------------------------------------------------------------
def progress(done: int, total: int | None, seconds: float, unit: str = "samples") -> Progress:
    return Progress(1, "calibrating", done, total, unit, seconds)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (None, "▶ collect 7 s"),
        (progress(8, 32, 2.0), "▶ collect: calibrating ━━────── 8/32 samples 4 samples/s ETA 6 s"),
        (progress(3, None, 2.0), "▶ collect: calibrating 3 samples 1.5 samples/s"),
        (progress(0, 32, 0.0), "▶ collect: calibrating ──────── 0/32 samples"),
        (progress(3 << 20, 6 << 20, 1.0, "B"),
         "▶ collect: calibrating ━━━━──── 3.0 MiB/6.0 MiB 3.0 MiB/s ETA 1 s"),
    ],
)  # fmt: skip
def test_a_job_shows_what_is_known_of_it(step: Progress | None, text: str) -> None:
    job = Job(1, "collect --dataset demo:mixed", started=100.0, progress=step)
    assert job_text(job, now=107.0).plain == text


@pytest.mark.parametrize("width", [10, 40, 78, 118, 198])
def test_the_status_line_fits_and_keeps_the_job_longest(width: int) -> None:
    engine = FakeEngine()
    engine.play("load demo", *STAGED)
    job = Job(1, "collect", 0.0, progress(8, 32, 2.0))
    state = AppState(view=engine.view(), jobs=(job,))
    text = status_text(state, width, 1.0)
    assert text.cell_len <= width
    assert "▶ coll" in text.plain


def test_the_key_bar_knows_where_each_of_its_keys_is() -> None:
    text, spans = bar_text(
        [
            hints.Hint("c", "calibrate", "collect", leads=True),
            hints.Hint("p", "prune", "prune", applies=False),
        ]
    )
    assert text.plain == "c calibrate  p prune  "
    assert [text.plain[a:b] for a, b, _ in spans] == ["c calibrate", "p prune"]


# Palette --------------------------------------------------------------------------------------
def test_the_palette_holds_every_command_and_every_key() -> None:
    engine = FakeEngine()
    engine.play("load demo", *CALIBRATED)
    found = palette.items(AppState(view=engine.view(), rows=engine.rows()))
    assert {row.name for row in engine.rows()} <= {item.command for item in found}
    listed = {item.key for item in found}
    assert {key.id for key in KEYS} - listed == {"palette", "escape"}


def test_what_cannot_be_chosen_now_says_why() -> None:
    engine = FakeEngine()
    engine.play("load demo")
    found = {i.command: i for i in palette.items(AppState(view=engine.view(), rows=engine.rows()))}
    assert found["apply"].reason == "nothing is staged: prune --n-prune 4"
    assert "not now" in palette.display(found["apply"]).plain
    assert found["info"].reason == ""


def test_every_entry_of_the_palette_can_be_chosen() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        app = shell.app
        for listed in palette.items(app.state):
            # What was chosen before it may have changed whether it applies.
            item = next(i for i in palette.items(app.state) if i.title == listed.title)
            if item.key in ("quit", "help"):
                continue
            before = len(shell.engine.lines)
            app.main.command.input.value = ""
            app.choose(item)
            await shell.pilot.pause()
            form = app.screen if isinstance(app.screen, FormScreen) else None
            if not isinstance(app.screen, MainScreen):
                await shell.press("escape")
            if item.reason:
                assert item.reason in shell.echo
            elif item.command == "load":
                assert shell.engine.lines[before:] == ["load"]  # lists the models
            elif app.engine.form(item.command) is not None and item.key is None:
                assert form is not None
                assert form.line == item.command
            elif item.key is None:
                assert app.main.command.input.value == f"{item.command} "
            elif next(key for key in KEYS if key.id == item.key).kind == "run":
                assert shell.engine.lines[before:], item.title

    drive(test)


def test_a_command_that_cannot_run_yet_stands_above_looser_matches() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        # The help of other keys has the word as well.
        await shell.press("ctrl+p", *"compare")
        await shell.until(lambda: "not now" in shell.screen)
        lines = shell.screen.splitlines()
        found = [n for n, line in enumerate(lines) if "(" in line and n > 3]
        assert "compare (=)  not now: there is one state only" in lines[found[0]]

    drive(test, size=(100, 40))


def test_the_palette_finds_runs_and_explains() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+p", *"discard")
        await shell.pilot.pause(0.3)
        await shell.press("enter")
        await shell.pilot.pause(0.1)
        await shell.settle()
        assert shell.engine.lines[-1] == "discard"

    drive(test)


def test_help_explains_the_focused_panel_and_the_typed_command() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        console = Console(width=100, color_system=None)

        def page() -> str:
            with console.capture() as capture:
                console.print(shell.app.screen._page)  # type: ignore[attr-defined]
            return capture.get()

        await shell.press("f1")
        assert page().startswith("experts")
        assert "force this expert on" in page()
        assert "not now: nothing is staged" in page()
        await shell.press("escape", "colon", *"prune --", "f1")
        assert page().startswith("command line")
        assert "prune [OPTIONS]" in page()

    drive(test)


def test_help_on_a_typed_line_is_about_its_command_or_what_help_names() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        state = shell.app.state
        assert topic("prune --n-prune 4", state) == "prune"
        assert topic("plan save kept.json", state) == "plan save"
        assert topic("help pruning", state) == "pruning"
        assert topic("help plan save", state) == "plan save"
        assert topic("help", state) == "help"
        assert topic("nonsense", state) is None
        asked = []
        shell.engine.help = lambda name, width: asked.append((name, width)) or "page\n" * 80
        await shell.press("colon", *"help pruning", "f1")
        assert asked == [("pruning", HelpScreen.columns(shell.app.size.width))]
        static = shell.app.screen.query_one("Static")
        assert static.size.width == HelpScreen.columns(shell.app.size.width)

    drive(test)
