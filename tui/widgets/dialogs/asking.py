"""Base class of the windows with a text field: what is typed while they open is not lost."""

from __future__ import annotations

from typing import TypeVar

from textual import events
from textual.screen import ModalScreen
from textual.widgets import Input

T = TypeVar("T")


class AskingScreen(ModalScreen[T]):
    """A window whose first Input has the focus from the start."""

    # Ours, at once: letters may be on their way.
    AUTO_FOCUS = None

    def on_mount(self) -> None:
        self.set_focus(self.query(Input).first())

    async def on_key(self, event: events.Key) -> None:
        """Give the field what was typed before there was one, and what was typed beside it."""
        field = self.focused
        if not isinstance(field, Input):
            field = self.query(Input).first()
            self.set_focus(field)
        if event.is_printable and event.character is not None:
            event.stop()
            field.insert_text_at_cursor(event.character)
        elif event.key == "enter":
            event.stop()
            await field.action_submit()
