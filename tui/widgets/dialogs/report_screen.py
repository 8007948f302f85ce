"""A window with one report on the whole screen: scrolled, searched, opened in an editor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from rich.console import RenderableType
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen

from mlxfun.report import Report
from tui.state.app_state import Entry
from tui.widgets.dialogs.find import FindScreen
from tui.widgets.lineview import Block
from tui.widgets.log import Reports, entry_lines


class OneReport(Reports):
    """The lines of one report; the arrows scroll them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("up,k", "scroll_up", "up"),
        ("down,j", "scroll_down", "down"),
        ("home,g", "scroll_home", "top"),
        ("end,G", "scroll_end", "bottom"),
    ]

    def on_mount(self) -> None:
        # The keys of the panel act on the panel.
        for keys in ("enter", "o", "slash", "n", "N"):
            self._bindings.key_to_bindings.pop(keys, None)


class ReportScreen(ModalScreen[bool]):
    """Shows one entry until it is closed; True asks for an editor. renderer: draws its report."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,q,enter", "dismiss(False)", "close"),
        ("e,o", "dismiss(True)", "open in editor"),
        ("slash", "search", "search"),
        ("n", "again(1)", "next match"),
        ("N", "again(-1)", "previous match"),
    ]

    DEFAULT_CSS = """
    ReportScreen { background: $background; }
    ReportScreen > Vertical { width: 100%; height: 100%; border: round $accent;
                              background: $background; padding: 0 1; }
    """

    def __init__(self, entry: Entry, renderer: Callable[[Report], RenderableType]) -> None:
        super().__init__()
        self._entry, self._renderer, self._words = entry, renderer, ""

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "report"
            box.border_subtitle = "/ searches, e opens it in an editor, escape closes"
            yield OneReport()

    def on_mount(self) -> None:
        view = self.query_one(OneReport)
        self.set_focus(view)
        draw = partial(entry_lines, self._entry, console=self.app.console, renderer=self._renderer)
        view.show_blocks([Block(0, self._entry, draw)])

    def action_search(self) -> None:
        """Ask for words and go to the first place that has them."""

        def asked(words: str | None) -> None:
            if words:
                self._words = words
                self.action_again(1)

        self.app.push_screen(FindScreen("search", "words of the report"), asked)

    def action_again(self, by: int) -> None:
        """Go on to the next place; the border says if there is none."""
        problem = self.query_one(OneReport).search(self._words, by)
        self.query_one(Vertical).border_title = problem or "report"
