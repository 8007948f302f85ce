"""The question before leaving the model: what would be lost, and what can be done about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.keys.key_labels import KeyNames
from tui.keys.keymap import BY_ID

Answer = Literal["leave", "save", "stay"]
"""What the user chose."""

Doing = Literal["quit", "load"]
"""How the model is left: with the program, or for another one."""


class LeaveScreen(ModalScreen[Answer]):
    """Lists what is unsaved. lost: a sentence each. names: what the keys are called."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "dismiss('stay')", "stay"),
        # The keys that save and leave elsewhere, whichever the user has made them.
        Binding(BY_ID["save"].keys, "dismiss('save')", "save", id="save"),
        Binding(BY_ID["quit"].keys, "quit", "leave", id="quit", priority=True),
        Binding(BY_ID["closer"].keys, "load", "load anyway", id="closer"),
    ]

    DEFAULT_CSS = """
    LeaveScreen { align: center middle; }
    LeaveScreen > Vertical { width: 90%; max-width: 84; height: auto; max-height: 90%;
                             border: round $warning; background: $surface; padding: 0 2; }
    LeaveScreen Static { width: 1fr; height: auto; }
    """

    def __init__(self, lost: Sequence[str], names: KeyNames, doing: Doing = "quit") -> None:
        super().__init__()
        self._lost, self._names, self.doing = lost, names, doing

    def action_quit(self) -> None:
        """Leave, where that was asked; a quit while a load is asked about is no answer to that."""
        self.dismiss("leave" if self.doing == "quit" else "stay")

    def action_load(self) -> None:
        """Load, where that was asked."""
        if self.doing == "load":
            self.dismiss("leave")

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "Unsaved" if self._lost else "Quit"
            listed = "\n".join(f"• {one}" for one in self._lost)
            yield Static(Text(listed or "Everything is saved."))
            anyway = "{quit} quit anyway" if self.doing == "quit" else "{closer} load anyway"
            ways = f"\n{{save}} save   {anyway}   {{escape}} stay"
            ways = ways if self._lost else "\n{quit} quit   {escape} stay"
            ways = self._names.say(ways)
            yield Static(Text(ways, style="bold"))
