"""Messages from widgets to the screen: what the user asked for. No widget acts on its own."""

from __future__ import annotations

from textual.message import Message

from tui.keys.keymap import PanelName
from tui.state.app_state import Level


class EventsWaiting(Message):
    """The event queue holds events that should be shown at once."""


class CellClicked(Message):
    """A cell of the heatmap was clicked. position: of the MoE layer, 0-based."""

    def __init__(self, position: int, expert: int) -> None:
        super().__init__()
        self.position, self.expert = position, expert


class ExpertClicked(Message):
    """A line in the view of one layer was clicked."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert


class LineEntered(Message):
    """A command line was submitted."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line


class ChatEntered(Message):
    """A text for the model was submitted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class TextPasted(Message):
    """A long text was pasted into the chat field. text: all that is in the field now."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class MessageRaised(Message):
    """A widget has a message for the echo line. level: as in the log."""

    def __init__(self, level: Level, text: str) -> None:
        super().__init__()
        self.level, self.text = level, text


class PanelChosen(Message):
    """A panel was focused, or chosen on the tab strip. move: give it the focus."""

    def __init__(self, panel: PanelName, *, move: bool) -> None:
        super().__init__()
        self.panel, self.move = panel, move


class KeyUsed(Message):
    """A key of the keymap was pressed, clicked or chosen in the palette."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
