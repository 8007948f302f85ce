"""The window with the profile of one expert; the arrows go on to its neighbours."""

from __future__ import annotations

from typing import ClassVar

from rich.console import Group
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Static

from tui.keys.keymap import BY_ID
from tui.messages import Stepped
from tui.widgets.dialogs.help import HelpScreen


class DossierScreen(HelpScreen):
    """Shows a page; left and right ask for that of the expert before and behind it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(BY_ID["left"].keys, "step(-1)", "expert before", id="left"),
        Binding(BY_ID["right"].keys, "step(1)", "next expert", id="right"),
    ]

    def __init__(self, page: Group, hint: str) -> None:
        super().__init__(page)
        self._hint = hint

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).border_subtitle = self._hint

    def action_step(self, by: int) -> None:
        """Ask for the expert `by` places further on; its page comes with `show`."""
        self.post_message(Stepped(by))

    def wait(self, name: str) -> None:
        """Say which expert is being looked at."""
        self.query_one(VerticalScroll).border_title = f"looking at {name} ..."

    def show(self, page: Group) -> None:
        """Show another page."""
        self.query_one(VerticalScroll).border_title = ""
        self.query_one(Static).update(page)
