"""The command line: input with completion and history, and a line above it for the last result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input

from tui.keys.key_labels import USUAL, KeyNames
from tui.messages import LineEntered
from tui.ports import Completion
from tui.state.app_state import AppState, Entry
from tui.widgets.fields import Field, FieldInput
from tui.widgets.line import Line
from tui.widgets.log import MARKS

LOUD = ("warning", "error")
"""Levels of messages that hide the completions of a line until it is changed."""

Completer = Callable[[str], Sequence[Completion]]


class InlineCompletion(Suggester):
    """Shows the best completion, dim, behind the cursor. Not cached: it depends on the state."""

    def __init__(self, complete: Completer) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._complete = complete

    async def get_suggestion(self, value: str) -> str | None:
        if not value.strip():
            return None
        first = next(iter(in_order(self._complete(value), value)), None)
        whole = value[: first.start] + first.text if first is not None else ""
        return whole.rstrip() if whole.startswith(value) and whole != value else None


def in_order(options: Sequence[Completion], typed: str) -> list[Completion]:
    """Completions in the order in which Tab takes them: what continues the line comes first."""
    return sorted(options, key=lambda o: not (typed[: o.start] + o.text).startswith(typed))


class LineInput(FieldInput):
    """Tab cycles through completions, up and down through the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("tab", "complete(1)", "complete"),
        ("shift+tab", "complete(-1)", "complete back"),
        ("up", "recall(-1)", "older"),
        ("down", "recall(1)", "newer"),
    ]

    def __init__(self, complete: Completer, past: Sequence[str]) -> None:
        super().__init__(suggester=InlineCompletion(complete), select_on_focus=False)
        self._complete = complete
        self.past = list(past)
        self._place = len(self.past)
        self._draft = ""
        self._recalled = ""
        self._round: tuple[str, str, int] | None = None  # typed, now, which
        self._marked = ""  # the line that was selected to be replaced or corrected

    @property
    def _ghost(self) -> str:
        """The dim suggestion behind the cursor, "" for none."""
        shown: str = self._suggestion
        return shown if self.cursor_position == len(self.value) else ""

    def action_complete(self, step: int) -> None:
        if not self.value.strip():
            (self.screen.focus_next if step > 0 else self.screen.focus_previous)()
            return
        typed, which = self.value, 0
        if self._round is not None and self._round[1] == self.value:
            typed, which = self._round[0], self._round[2] + step
        options = in_order(self._complete(typed), typed)
        if not options:
            self.app.bell()
            return
        option = options[which % len(options)]
        # Words are finished; directories and values in the middle are not.
        space = "" if option.text.endswith(("/", ":", "=", " ")) else " "
        self.fill(typed[: option.start] + option.text + space)
        self._round = (typed, self.value, which)

    def action_recall(self, step: int) -> None:
        """Show the next older (-1) or newer (1) line that begins as what was typed does."""
        if self._place == len(self.past) or self.value != self._recalled:
            self._draft, self._place = self.value, len(self.past)
        place = self._place + step
        while 0 <= place < len(self.past) and not self.past[place].startswith(self._draft):
            place += step
        if place < 0:
            self.app.bell()
        elif place <= len(self.past) and place != self._place:
            self._place = place
            self.fill(self.past[place] if place < len(self.past) else self._draft)
            self._recalled = self.value

    def fill(self, line: str) -> None:
        """Put `line` into the field with the cursor behind it."""
        self.value = line
        self.cursor_position = len(line)

    def mark_whole(self) -> None:
        """Select the line: what is typed replaces it, while the arrows and backspace correct it."""
        self.select_all()
        self._marked = self.value

    def action_delete_left(self) -> None:
        if self._marked and self.selected_text == self._marked:
            self.cursor_position = len(self.value)  # a correction, not the removal of everything
        self._marked = ""
        super().action_delete_left()

    def remember(self, line: str) -> None:
        """Add a submitted line to the history and move to its end."""
        if not self.past or self.past[-1] != line:
            self.past.append(line)
        self._place, self._draft = len(self.past), ""


class CommandField(Field):
    """The prompt and the input of the command line."""

    def __init__(self, complete: Completer, past: Sequence[str]) -> None:
        self._arguments = (complete, past)
        super().__init__(prompt=":", id="line")

    def make(self) -> LineInput:
        return LineInput(*self._arguments)


class CommandLine(Vertical):
    """An echo line above an input. complete: the completions of a line. past: earlier lines."""

    DEFAULT_CSS = """
    CommandLine { height: 2; padding: 0 1; }
    CommandLine #echo { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    """

    about = (
        "Type any command. Tab and the right arrow accept the dim suggestion, Tab again cycles "
        "through the other completions. Up and down recall earlier lines that begin like this one, "
        "{search_lines} searches them, Enter runs the line, {escape} leaves. The focus stays "
        "here until you leave; a line that failed comes back for correction. `help` lists commands "
        "and guides, `help prune` explains a command, `help pruning` is a guide."
    )

    def __init__(self, complete: Completer, past: Sequence[str] = ()) -> None:
        super().__init__(id="command")
        self._complete = complete
        self._past = past
        self._echo: Entry | None = None
        self._hint = ""
        self._names = USUAL
        self._back: Widget | None = None
        self._refused = ""  # the line at the time of the last loud message
        self._logged = False
        self._lent = False  # by a key that put a line into the field

    def compose(self) -> ComposeResult:
        yield Line(id="echo")
        yield CommandField(self._complete, self._past)

    @property
    def input(self) -> LineInput:
        """The field itself."""
        return self.query_one(LineInput)

    def show(self, state: AppState, hint: str) -> None:
        """Show the newest message of `state`; `hint` where there is none."""
        if state.echo is not self._echo and state.echo and state.echo.level in LOUD:
            self._refused = self.input.value
        self._echo, self._hint, self._names = state.echo, hint, state.names
        self._logged = bool(state.log) and state.log[-1] is state.echo
        self._draw()

    def fill(self, line: str) -> None:
        """Put `line` into the input and focus it; Enter returns the focus."""
        self._lent = self.screen.focused is not self.input
        self.input.fill(line)
        self.open()

    def give_back(self, line: str, *, focus: bool) -> None:
        """Put a line that was refused or failed into the input for correction."""
        self._refused = line
        self.input.fill(line)
        self.input.mark_whole()
        if focus:
            self.open()

    def open(self) -> None:
        """Take the focus until {escape} or an empty line returns it to the widget that has it now."""
        if self.screen.focused is not self.input:
            self._back = self.screen.focused
            if self.input.value and self.input.value == self._refused:
                self.input.mark_whole()
        self.enter()

    def enter(self) -> None:
        """Take the focus and keep it; at once, since letters may follow."""
        self.screen.set_focus(self.input)

    def _draw(self) -> None:
        options: Sequence[Completion] = ()
        typed = self.input.value
        if self.input.has_focus and typed.strip() and typed != self._refused:
            options = self._complete(self.input.value)
        if options:
            text = completions(options)
        elif self._echo is not None:
            mark, style = MARKS[self._echo.level]
            text = Text(mark, style=style, no_wrap=True, overflow="ellipsis")
            plain = Style(bold=False, color=None if self._echo.level == "error" else "default")
            text.append(one_line(self._echo, self._names), plain)
            where = self._names.say(" ({panel_log})")
            if self._logged and text.cell_len > self.size.width - 2 > len(where):
                # What does not fit is read in the reports.
                text.truncate(self.size.width - 2 - len(where), overflow="ellipsis")
                text.append(where, Style(bold=False, dim=True))
        else:
            text = Text(self._hint, style="dim", no_wrap=True, overflow="ellipsis")
        self.query_one("#echo", Line).put(text)

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        self._draw()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        # Someone who types ahead may type a colon into the open line.
        line = event.value.strip().lstrip(":").strip()
        if line:
            self.input.remember(line)
            self.post_message(LineEntered(line))
        # A key that offered the line gives the focus back; who opened the field stays in it.
        if self._back is not None and (self._lent or not line):
            self.screen.set_focus(self._back if self._back.display else None)
            self._back = None
        self._lent = False

    def on_descendant_focus(self, _: events.DescendantFocus) -> None:
        self._draw()

    def on_descendant_blur(self, _: events.DescendantBlur) -> None:
        self._back = None
        self._draw()


def one_line(entry: Entry, names: KeyNames) -> str:
    """An entry for the echo line; for a page of text only where to read it."""
    if entry.report is not None and "\n" in entry.text.strip():
        return f"{entry.line}: {names.say('see the reports ({panel_log})')}"
    return " ".join(entry.text.split())


def completions(options: Sequence[Completion], most: int = 12, *, hints: bool = True) -> Text:
    """Completions in one line; the first with its hint, unless not wanted."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for index, option in enumerate(options[:most]):
        text.append(option.text.strip() or option.text, "bold" if index == 0 else "dim")
        if hints and option.hint and index == 0:
            text.append(f" {option.hint}", "italic")
        text.append("   ")
    return text
