"""The field that asks for an expert to jump to, or for words to search."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import Input

from tui.widgets.dialogs.asking import AskingScreen
from tui.widgets.fields import FieldInput


class FindScreen(AskingScreen[str | None]):
    """Takes one line; Escape gives None."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "close")]

    DEFAULT_CSS = """
    FindScreen { align: center middle; background: $background 40%; }
    FindScreen > Vertical { width: 44; height: 3; border: round $accent; background: $surface;
                            padding: 0 1; }
    """

    def __init__(self, title: str, hint: str, words: str = "") -> None:
        """title: of the window; hint: what can be typed; words: what is in the field already."""
        super().__init__()
        self._title, self._hint, self._words = title, hint, words

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            yield FieldInput(self._words, placeholder=self._hint, select_on_focus=True)

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip() or None)
