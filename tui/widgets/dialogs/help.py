"""The help window (F1): the focused panel explained, and every key that works there."""

from __future__ import annotations

from typing import ClassVar

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui import hints
from tui.keys.keymap import BY_ID, Key, Place, keys_for
from tui.state.app_state import AppState


def help_page(title: str, about: str, panel: Place, state: AppState) -> Group:
    """The page for one panel; keys that do nothing now say why."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key in in_order(panel):
        reason = hints.why_not(state, key)
        text = Text(state.names.say(key.help), style="dim" if reason else "")
        if reason:
            text.append(f" (not now: {reason})", "dim italic")
        text.append(f"  {key.id}", "dim")  # its name in the user's configuration
        # As Text: a bracket is a key, not markup.
        table.add_row(Text("  ".join(state.names.all(key.id)) or state.names[key.id]), text)
    step = hints.next_step(state)
    parts = [Text(title, style="bold underline"), Text(), Text(about), Text()]
    if step:
        parts += [Text(f"Next: {step}", style="bold"), Text()]
    return Group(*parts, table)


def topic(line: str, state: AppState) -> str | None:
    """What a typed line is about: its command, or behind `help` the words that follow."""
    words = line.split()
    if words[:1] == ["help"] and words[1:]:
        return " ".join(words[1:])
    names = (" ".join(words[:2]), *words[:1])  # some commands have two words
    return next((name for name in names if state.row(name)), None)


def in_order(panel: Place) -> list[Key]:
    """The keys of a panel in the order of its page: those of the key bar first."""
    keys = keys_for(panel)
    return sorted(keys, key=lambda key: (key.bar == 0, not key.works_in(panel)))


class HelpScreen(ModalScreen[None]):
    """Shows a page until it is closed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,q,enter", "dismiss", "close"),
        # The key that opened it, whichever the user has made that.
        Binding(BY_ID["help"].keys, "dismiss", "close", id="help"),
    ]

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > VerticalScroll { width: 90%; max-width: 92; height: 90%; border: round $accent;
                                  background: $surface; padding: 0 2;
                                  scrollbar-size-vertical: 1; }
    HelpScreen Static { width: 1fr; }
    """

    @staticmethod
    def columns(width: int) -> int:
        """Columns of text on a terminal of `width` columns: less border, padding, scroll bar."""
        return min(width * 9 // 10, 92) - 7

    def __init__(self, page: Group) -> None:
        super().__init__()
        self._page = page

    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=True) as scroll:
            scroll.border_subtitle = "escape closes"
            yield Static(self._page)
