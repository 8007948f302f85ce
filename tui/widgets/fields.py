"""A one-line text field with a sign in front."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Input, Static

from tui.messages import KeyUsed


class FieldInput(Input):
    """An Input without a frame. Ctrl+C copies what is selected and else interrupts, as it would
    in a shell."""

    DEFAULT_CSS = """
    FieldInput, FieldInput:focus { border: none; height: 1; padding: 0; background: $surface;
                                   background-tint: $foreground 0%; }
    """

    def action_copy(self) -> None:
        if self.selected_text:
            super().action_copy()
        else:
            self.post_message(KeyUsed("interrupt"))


class Field(Horizontal):
    """A sign and an input. Override `make` for another kind of input."""

    DEFAULT_CSS = """
    Field { height: 1; background: $surface; }
    Field > .sign { width: auto; padding: 0 1 0 0; color: $foreground 60%; }
    Field:focus-within > .sign { color: $accent; text-style: bold; }
    """

    def __init__(self, prompt: str, id: str) -> None:
        super().__init__(id=id)
        self._sign = prompt
        self.input = self.make()

    def sign(self, text: str) -> None:
        """Show another sign in front."""
        if text != self._sign:
            self._sign = text
            self.query_one(".sign", Static).update(text)

    def make(self) -> Input:
        """The input to use."""
        return FieldInput(select_on_focus=False)

    def compose(self) -> ComposeResult:
        yield Static(self._sign, classes="sign", markup=False)
        yield self.input
