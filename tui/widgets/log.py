"""The reports panel: each command with its report, newest at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.editing.reports import PlanReport
from mlxfun.generation.reports import ABReport, ChatReport
from mlxfun.report import Report
from tui.state.app_state import AppState, Entry
from tui.text import duration, harmless
from tui.widgets.lineview import Block, Lines, LineView
from tui.widgets.panel import Panel

MARKS = {
    "ok": ("✓ ", Style(color="green", bold=True)),
    "info": ("· ", Style(dim=True)),
    "warning": ("! ", Style(color="yellow", bold=True)),
    "error": ("✗ ", Style(color="red", bold=True)),
}


def heading(entry: Entry) -> Text:
    """The command of an entry and its duration, or the text of a message."""
    mark, style = MARKS[entry.level]
    text = Text(mark, style=style)
    if not entry.line:
        return text.append(entry.text, "not bold")
    text.append(entry.line, Style(bold=True, color="default"))
    if entry.seconds >= 0.05:
        text.append(f"  {duration(entry.seconds)}", Style(dim=True, bold=False, color="default"))
    return text


def entry_lines(
    entry: Entry, width: int, console: Console, renderer: Callable[[Report], RenderableType]
) -> Lines:
    """An entry as lines: its heading, then its report or the error."""
    parts: list[RenderableType] = [heading(entry)]
    if isinstance(entry.report, ChatReport | ABReport):
        # The answer is in the chat panel; here it would take too much room.
        parts.append(Text(entry.text, style="dim"))
    elif type(entry.report) is PlanReport:
        # The plan panel has its layers.
        parts.append(Text(entry.text))
    elif entry.report is not None:
        parts.append(renderer(entry.report))
    elif entry.line:
        parts.append(Text(entry.text))
    lines = console.render_lines(Group(*parts), console.options.update(width=width), pad=False)
    # Reports hold names of files and models, which must not drive the terminal.
    return [[Segment(harmless(s.text), s.style or Style()) for s in line] for line in lines]


class Reports(LineView):
    """The scrolling view of the log; a new entry is shown from its heading on."""

    to_head = True


class LogPanel(Panel):
    """Reports and messages. renderer: makes a report readable."""

    panel = "log"
    title = "reports"
    about = (
        "Every command leaves its report here: ✓ done, ✗ failed and why, ! worth knowing. "
        "Scroll with the arrow keys and Page Up and Page Down; {zoom} gives it the whole screen."
    )

    DEFAULT_CSS = """
    LogPanel #quiet { height: 1fr; color: $foreground 70%; }
    """

    def __init__(self, renderer: Callable[[Report], RenderableType]) -> None:
        super().__init__()
        self._renderer = renderer
        self._log: tuple[Entry, ...] = ()

    def compose(self) -> ComposeResult:
        yield Static("Nothing has happened yet. Every command leaves its report here.", id="quiet")
        yield Reports()

    def wanted(self) -> int:
        return self.query_one(Reports).line_count + 2

    def entrance(self) -> Widget:
        return self.query_one(Reports)

    def show(self, state: AppState) -> None:
        """Draw the log of `state`."""
        self.entitle(state.names)
        if state.log is self._log:
            return
        self._log = state.log
        self.query_one("#quiet").display = False
        console, renderer = self.app.console, self._renderer
        self.query_one(Reports).show_blocks(
            [
                Block(
                    id(entry),
                    entry,
                    partial(entry_lines, entry, console=console, renderer=renderer),
                )
                for entry in state.log
            ]
        )
