"""The chat's text field: one line that grows with what is typed or pasted into it."""

from __future__ import annotations

from textual import events
from textual.message import Message
from textual.widgets import TextArea

from tui.messages import KeyUsed, TextPasted
from tui.widgets.fields import ran_binding

LONG = 1000
"""Characters from which on the tokens of a pasted text are counted before it is sent."""


class ChatInput(TextArea):
    """Enter sends; pasted text keeps its lines. Ctrl+C copies a selection, otherwise interrupts."""

    DEFAULT_CSS = """
    ChatInput, ChatInput:focus { border: none; padding: 0; height: auto; min-height: 1;
                                 max-height: 6; background: $surface; width: 1fr;
                                 background-tint: $foreground 0%; scrollbar-size-vertical: 1; }
    """

    class Submitted(Message):
        """A text was sent."""

        def __init__(self, value: str) -> None:
            super().__init__()
            self.value = value

    def __init__(self) -> None:
        super().__init__(compact=True, highlight_cursor_line=False)

    @property
    def value(self) -> str:
        """The text in the field."""
        return self.text

    @value.setter
    def value(self, text: str) -> None:
        self.text = text
        self.move_cursor(self.document.end)

    def new_line(self) -> None:
        """Break the line at the cursor."""
        self.insert("\n")

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            text, self.text = self.text, ""
            self.post_message(self.Submitted(text))
            return
        if not await ran_binding(self, event):
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        await super()._on_paste(event)
        if len(self.text) >= LONG:
            self.post_message(TextPasted(self.text))

    def action_copy(self) -> None:
        if self.selected_text:
            super().action_copy()
        else:
            self.post_message(KeyUsed("interrupt"))
