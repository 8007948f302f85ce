"""The field that asks for an expert to jump to."""

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
    """Takes the name of an expert; Escape gives None."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "close")]

    DEFAULT_CSS = """
    FindScreen { align: center middle; background: $background 40%; }
    FindScreen > Vertical { width: 44; height: 3; border: round $accent; background: $surface;
                            padding: 0 1; }
    """

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "jump to expert"
            yield FieldInput(placeholder="layer:expert, such as 12:40")

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip() or None)
