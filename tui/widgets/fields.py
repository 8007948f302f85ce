"""A one-line text field with a prompt sign."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Input, Static

from tui.messages import KeyUsed, MessageRaised


async def ran_binding(field: Widget, event: events.Key) -> bool:
    """Run at once what a key is bound to in a text field; whether there was something.

    Textual runs a binding once its key has gone up to the screen and back. Letters that come right
    behind it would be there first: Ctrl+U would take them away, Enter send them along.
    """
    bound = None if event.is_printable else field.screen.active_bindings.get(event.key)
    if bound is None or bound.node is not field or not bound.enabled:
        return False
    event.stop()
    event.prevent_default()
    await field.app.run_action(bound.binding.action, field)
    return True


class FieldInput(Input):
    """An Input without a frame. Ctrl+C copies a selection, and otherwise interrupts."""

    DEFAULT_CSS = """
    FieldInput, FieldInput:focus { border: none; height: 1; padding: 0; background: $surface;
                                   background-tint: $foreground 0%; }
    """

    async def _on_key(self, event: events.Key) -> None:
        if not await ran_binding(self, event):
            await super()._on_key(event)

    def _on_paste(self, event: events.Paste) -> None:
        lines = [line.strip() for line in event.text.splitlines() if line.strip()]
        if len(lines) > 1:
            # Textual would keep the first line and drop the others.
            event.stop()
            event.prevent_default()
            self.insert_text_at_cursor(" ".join(lines))
            self.post_message(MessageRaised("info", f"{len(lines)} lines were pasted as one"))

    async def action_submit(self) -> None:
        line, self.value = self.value, ""
        self.post_message(self.Submitted(self, line))

    def action_copy(self) -> None:
        if self.selected_text:
            super().action_copy()
        else:
            self.post_message(KeyUsed("interrupt"))


class Field(Horizontal):
    """A prompt and an input. Override `make` for another kind of input."""

    DEFAULT_CSS = """
    Field { height: auto; background: $surface; }
    Field > .sign { width: auto; padding: 0 1 0 0; color: $foreground 60%; }
    Field:focus-within > .sign { color: $accent; text-style: bold; }
    """

    def __init__(self, prompt: str, id: str) -> None:
        super().__init__(id=id)
        self._sign = prompt
        self.input = self.make()

    def sign(self, text: str) -> None:
        """Show another prompt."""
        if text != self._sign:
            self._sign = text
            self.query_one(".sign", Static).update(text)

    def make(self) -> Widget:
        """Make the input."""
        return FieldInput(select_on_focus=False)

    def compose(self) -> ComposeResult:
        yield Static(self._sign, classes="sign", markup=False)
        yield self.input
