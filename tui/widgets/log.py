"""The reports panel: each command with its report, newest at the end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.editing.reports import PlanReport
from mlxfun.generation.reports import ABReport, ChatReport
from mlxfun.report import Report
from tui.keys.keymap import bindings
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


FOUND = Style(reverse=True, bold=True)


class Reports(LineView):
    """The scrolling view of reports; a new one is shown from its heading on.

    One report is under the cursor, the newest until another is chosen. Words that are searched are
    marked wherever they stand.
    """

    to_head = True

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("log")]

    def __init__(self) -> None:
        super().__init__()
        self._at: int | None = None  # None: the newest
        self._words = ""
        self._found = -1  # the line of the last match

    @property
    def at(self) -> int:
        """Which report is under the cursor, -1 without any."""
        last = len(self._starts) - 1
        return last if self._at is None else min(self._at, last)

    def show_blocks(self, blocks: Sequence[Block]) -> None:
        if self._blocks and blocks and blocks[-1].key != self._blocks[-1].key:
            self._at, self._found = None, -1
        super().show_blocks(blocks)

    def go(self, by: int) -> None:
        """Move the cursor by so many reports."""
        if self._starts:
            self._at = max(0, min(self.at + by, len(self._starts) - 1))
            self._reveal(self._starts[self._at])
            self.refresh()

    def _reveal(self, line: int) -> None:
        top, room = self.scroll_offset.y, self.size.height
        if not top <= line < top + room - 1:
            self.scroll_to(y=max(0, line), animate=False)

    def search(self, words: str, by: int = 1) -> str:
        """Go to the next (1) or previous (-1) line with `words`, in any case; why not, or ""."""
        if words != self._words:
            self._words, self._found = words, -1
        low = words.lower()
        lines = [n for n in range(len(self._lines)) if low in self.text_at(n).lower()]
        if not words or not lines:
            self._words = ""
            self.refresh()
            return f"no report has {words!r}" if words else "nothing is searched yet"
        here = self._found
        if here < 0:
            here = self.scroll_offset.y - 1 if by > 0 else len(self._lines)
        beyond = [n for n in lines if n > here] if by > 0 else [n for n in lines if n < here][::-1]
        self._found = beyond[0] if beyond else lines[0 if by > 0 else -1]
        self._at = bisect_right(self._starts, self._found) - 1
        self._reveal(self._found)
        self.refresh()
        return ""

    def finished(self, line: int, strip: Strip) -> Strip:
        """Mark the heading under the cursor and what is searched."""
        if (
            self.has_focus
            and self._starts
            and line == self._starts[self.at]
            and len(self._starts) > 1
        ):
            strip = strip.apply_style(Style(underline=True))
        return marked(strip, self._words) if self._words else strip

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()


def marked(strip: Strip, words: str) -> Strip:
    """The strip with every occurrence of `words`, in any case, reversed."""
    text, low = strip.text.lower(), words.lower()
    cuts, at = [], text.find(low)
    while at >= 0:
        cuts += [cell_len(text[:at]), cell_len(text[: at + len(low)])]
        at = text.find(low, at + len(low))
    if not cuts:
        return strip
    pieces = strip.divide([*cuts, strip.cell_length])
    return Strip.join(
        piece.apply_style(FOUND) if place % 2 else piece for place, piece in enumerate(pieces)
    )


class LogPanel(Panel):
    """Reports and messages. renderer: makes a report readable."""

    panel = "log"
    title = "reports"
    about = (
        "Every command leaves its report here: ✓ done, ✗ failed and why, ! worth knowing. "
        "{report_up} and {report_down} go from report to report, Page Up and Page Down scroll, "
        "{zoom} gives it the whole screen. "
        "{read} shows the report under the cursor on the whole screen, {edit_report} opens it in "
        "$EDITOR, or else in $PAGER. {search_log} searches all reports; {next_match} and "
        "{previous_match} go on to the next place."
    )

    DEFAULT_CSS = """
    LogPanel #quiet { height: 1fr; color: $foreground 70%; }
    """

    def __init__(self, renderer: Callable[[Report], RenderableType]) -> None:
        super().__init__()
        self.renderer = renderer
        self._log: tuple[Entry, ...] = ()

    def compose(self) -> ComposeResult:
        yield Static("Nothing has happened yet. Every command leaves its report here.", id="quiet")
        yield Reports()

    def wanted(self) -> int:
        return self.query_one(Reports).line_count + 2

    def entrance(self) -> Widget:
        return self.query_one(Reports)

    @property
    def entry(self) -> Entry | None:
        """The entry under the cursor."""
        at = self.query_one(Reports).at
        return self._log[at] if 0 <= at < len(self._log) else None

    def show(self, state: AppState) -> None:
        """Draw the log of `state`."""
        self.entitle(state.names)
        if state.log is self._log:
            return
        self._log = state.log
        self.query_one("#quiet").display = False
        console, renderer = self.app.console, self.renderer
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
