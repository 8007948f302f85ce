"""Keys that read: the reports panel and its search, one report on the whole screen or in an editor."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from textual.app import SuspendNotSupported

from tui.interaction.base import KeyHandlers, Verbs
from tui.state.app_state import Entry
from tui.widgets.dialogs.find import FindScreen
from tui.widgets.dialogs.report_screen import ReportScreen
from tui.widgets.log import LogPanel, Reports, entry_lines

PAGE = 100
"""Columns of a report in an editor."""


def editor() -> list[str]:
    """The user's editor, else the pager, as the words of a command."""
    for name in ("VISUAL", "EDITOR", "PAGER"):
        words = shlex.split(os.environ.get(name, ""))
        if words:
            return words
    return ["less"]


class ReadingKeys(KeyHandlers):
    """The part of the application that reads reports."""

    _sought = ""  # the words that were searched last

    def _reading_verbs(self) -> Verbs:
        return {
            "read_report": self._read_report,
            "search_log": self._search_log,
            "match": lambda by: self._match(int(by)),
            "edit_report": lambda: self._edit(self._log_panel.entry),
            "report": lambda by: self._reports.go(int(by)),
        }

    @property
    def _log_panel(self) -> LogPanel:
        return self.main.query_one(LogPanel)

    @property
    def _reports(self) -> Reports:
        return self.main.query_one(Reports)

    def _read_report(self) -> None:
        entry = self._log_panel.entry
        if entry is None:
            return

        def closed(edit: bool | None) -> None:
            if edit:
                self._edit(entry)

        self.push_screen(ReportScreen(entry, self._log_panel.renderer), closed)

    def _search_log(self) -> None:
        def asked(words: str | None) -> None:
            if words is not None:
                self._sought = words
                self._match(1)

        self.push_screen(FindScreen("search the reports", "words", self._sought), asked)

    def _match(self, by: int) -> None:
        problem = self._reports.search(self._sought, by)
        if problem:
            self._say("info", problem)

    def _edit(self, entry: Entry | None) -> None:
        """Open an entry as a text file in the user's editor, which takes the terminal meanwhile."""
        if entry is None:
            return
        words = editor()
        try:
            with tempfile.TemporaryDirectory(prefix="mlxfun-") as folder:
                file = Path(folder) / "report.txt"
                file.write_text(self._plain(entry), "utf-8")
                with self.suspend():
                    code = subprocess.run([*words, str(file)], check=False).returncode
        except SuspendNotSupported:
            self._say("warning", "this terminal cannot be handed over to another program")
        except OSError as problem:
            self._say("warning", f"{words[0]} cannot be run: {problem}; set $EDITOR or $PAGER")
        else:
            if code:
                self._say("warning", f"{words[0]} ended with code {code}")

    def _plain(self, entry: Entry) -> str:
        # Lines are only laid out: nothing is written to the console.
        console = Console(width=PAGE, color_system=None, file=io.StringIO())
        lines = entry_lines(entry, PAGE, console, self._log_panel.renderer)
        return "".join("".join(s.text for s in line).rstrip() + "\n" for line in lines)
