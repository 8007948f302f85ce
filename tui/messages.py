"""Messages from widgets to the screen: what the user asked for. No widget acts on its own."""

from __future__ import annotations

from textual.message import Message

from tui.keys.keymap import PanelName
from tui.layout import Edge
from tui.state.app_state import Level
from tui.state.sizes import Sizes


class EventsWaiting(Message):
    """The event queue holds events that should be shown at once."""


class MapLaidOut(Message):
    """The heatmap has another size, and with it other experts in a cell."""


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


class Stepped(Message):
    """The window of an expert's profile shall show the one `by` places further on."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by


class EdgeMoved(Message):
    """A side of a panel's frame was dragged to a cell of the screen. done: and was let go there."""

    def __init__(self, panel: PanelName, edge: Edge, to: tuple[int, int], *, done: bool) -> None:
        super().__init__()
        self.panel, self.edge, self.to, self.done = panel, edge, to, done


class Resized(Message):
    """The panels shall have these sizes. keep: also in later sessions."""

    def __init__(self, sizes: Sizes, *, keep: bool) -> None:
        super().__init__()
        self.sizes, self.keep = sizes, keep


class KeyUsed(Message):
    """A key of the keymap was pressed, clicked or chosen in the palette."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
