"""What happened: each command with its report, newest at the end."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import RenderableType
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import RichLog, Static

from mlxfun.reports import ChatReport, Report
from tui.state import AppState, Entry
from tui.text import duration
from tui.widgets.panel import Panel

MARKS = {
    "ok": ("✓ ", Style(color="green", bold=True)),
    "info": ("· ", Style(dim=True)),
    "warning": ("! ", Style(color="yellow", bold=True)),
    "error": ("✗ ", Style(color="red", bold=True)),
}


def heading(entry: Entry) -> Text:
    """The command of an entry and how long it took; "" for one that no command made."""
    mark, style = MARKS[entry.level]
    text = Text(mark, style=style)
    if not entry.line:
        return text.append(entry.text, "not bold")
    text.append(entry.line, Style(bold=True, color="default"))
    if entry.seconds >= 0.05:
        text.append(f"  {duration(entry.seconds)}", Style(dim=True, bold=False, color="default"))
    return text


class Lines(RichLog):
    """A RichLog that wraps and never reads user text as markup."""

    DEFAULT_CSS = """
    Lines { height: 1fr; background: $background; scrollbar-size-vertical: 1;
            overflow-x: hidden; scrollbar-gutter: stable; }
    """

    def __init__(self) -> None:
        super().__init__(wrap=True, markup=False, highlight=False, min_width=8)


class LogPanel(Panel):
    """Reports and messages. renderer: makes a report readable."""

    panel = "log"
    title = "reports"
    about = (
        "Every command leaves its report here: ✓ done, ✗ failed and why, ! worth knowing. "
        "Scroll with the arrow keys and Page Up and Page Down; z gives it the whole screen."
    )

    DEFAULT_CSS = """
    LogPanel #quiet { height: 1fr; color: $foreground 70%; }
    """

    def __init__(self, renderer: Callable[[Report], RenderableType]) -> None:
        super().__init__()
        self._renderer = renderer
        self._log: tuple[Entry, ...] = ()
        self._width = 0

    def compose(self) -> ComposeResult:
        yield Static("Nothing has happened yet. Every command leaves its report here.", id="quiet")
        yield Lines()

    def entrance(self) -> Widget:
        return self.query_one(Lines)

    def show(self, state: AppState) -> None:
        """Add what is new in the log of `state`."""
        if state.log is self._log:
            return
        known = self._log[-1] if self._log else None
        self._log = state.log
        self.query_one("#quiet").display = False
        fresh = list(state.log)
        for index in range(len(fresh) - 1, -1, -1):
            if fresh[index] is known:
                fresh = fresh[index + 1 :]
                break
        self._write(fresh)

    def _write(self, entries: list[Entry]) -> None:
        lines = self.query_one(Lines)
        for entry in entries:
            lines.write(heading(entry))
            if isinstance(entry.report, ChatReport):
                # The answer stands in the chat; twice would push everything else away.
                lines.write(Text(entry.text, style="dim"))
            elif entry.report is not None:
                lines.write(self._renderer(entry.report))
            elif entry.line:
                lines.write(Text(entry.text))

    def on_resize(self, event: events.Resize) -> None:
        # What is written keeps the width it was written for: write it again for the new one.
        if event.size.width and event.size.width != self._width:
            first, self._width = self._width == 0, event.size.width
            if not first:
                self.query_one(Lines).clear()
                self._write(list(self._log))
