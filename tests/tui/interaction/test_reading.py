"""Reports: chosen, searched, read on the whole screen, opened in an editor."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from tests.tui.driving import CALIBRATED, Shell, drive, ready, text_of
from tui.interaction import reading
from tui.widgets.dialogs.report_screen import OneReport, ReportScreen
from tui.widgets.log import Reports

LINES = (*CALIBRATED, "layers", "info", "prune --n-prune 4", "history")


def test_the_arrows_choose_a_report_and_enter_reads_it_on_the_whole_screen() -> None:
    @ready(*LINES)
    async def test(shell: Shell) -> None:
        await shell.press("5", "up", "up")
        reports = shell.app.main.query_one(Reports)
        lines = shell.app.state.log
        assert reports.at == len(lines) - 3
        await shell.press("enter")
        assert isinstance(shell.app.screen, ReportScreen)
        shown = shell.app.screen.query_one(OneReport)
        assert shown.size.width > 100
        assert lines[-3].line in shell.screen
        assert lines[-1].line not in shell.screen
        await shell.press("escape")
        # A new report is the one under the cursor.
        await shell.play("layers")
        assert reports.at == len(shell.app.state.log) - 1

    drive(test, size=(120, 40))


def test_a_search_goes_to_each_place_and_marks_it() -> None:
    @ready(*LINES)
    async def test(shell: Shell) -> None:
        await shell.press("5", "slash", *"PRUNE", "enter")
        reports = shell.app.main.query_one(Reports)
        places = [n for n in range(reports.line_count) if "prune" in reports.text_at(n).lower()]
        assert len(places) > 1
        assert reports._found in places
        first = reports._found
        await shell.press("n")
        assert reports._found in places
        assert reports._found != first
        await shell.press("N")
        assert reports._found == first
        styles = {
            segment.style.reverse
            for segment in reports.finished(first, reports._lines[first])
            if segment.style and segment.text.lower() == "prune"
        }
        assert styles == {True}
        await shell.press("slash", "ctrl+u", *"xyzzy", "enter")
        assert shell.echo == "· no report has 'xyzzy'"

    drive(test, size=(120, 40))


def test_a_report_is_searched_in_its_window_too() -> None:
    @ready(*LINES)
    async def test(shell: Shell) -> None:
        await shell.press("5", "enter", "slash", *"xyzzy", "enter")
        assert "no report has 'xyzzy'" in shell.screen
        assert isinstance(shell.app.screen, ReportScreen)

    drive(test, size=(80, 24))


def test_a_report_opens_in_the_users_editor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copies = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    swap = f'{sys.executable} -c "import sys; sys.argv.append({str(copy)!r}); {copies}"'
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", swap)

    @ready(*LINES)
    async def test(shell: Shell) -> None:
        monkeypatch.setattr(shell.app, "suspend", contextlib.nullcontext)
        await shell.press("5", "enter", "e")
        entry = shell.app.state.log[-1]
        assert copy.read_text().splitlines()[0].startswith(f"✓ {entry.line}")
        monkeypatch.setenv("EDITOR", "no-such-editor-anywhere")
        await shell.press("o")
        assert "no-such-editor-anywhere cannot be run" in shell.echo

    drive(test)


def test_the_pager_is_taken_where_there_is_no_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VISUAL", "EDITOR", "PAGER"):
        monkeypatch.delenv(name, raising=False)
    assert reading.editor() == ["less"]
    monkeypatch.setenv("PAGER", "most -s")
    assert reading.editor() == ["most", "-s"]


def test_a_layer_and_the_map_are_searched_by_number_topic_and_mark() -> None:
    @ready(*CALIBRATED, "steer --activate 2:5")
    async def test(shell: Shell) -> None:
        await shell.press("slash", *"forced", "enter")
        assert shell.app.state.cursor == (2, 5)
        await shell.press("enter", "slash", "ctrl+u", "1", "1", "enter")
        assert shell.app.state.cursor == (2, 11)
        assert "E11" in text_of(shell, type(shell.app.focused))

    drive(test, size=(120, 40))
