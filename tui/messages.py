"""Messages from widgets to the screen: what the user asked for. No widget acts on its own."""

from __future__ import annotations

from textual.message import Message


class Wake(Message):
    """The worker has news."""


class CursorPut(Message):
    """A cell of the heatmap was pointed at. position: of the MoE layer, 0-based."""

    def __init__(self, position: int, expert: int) -> None:
        super().__init__()
        self.position, self.expert = position, expert


class ExpertPut(Message):
    """An expert of the layer under the cursor was pointed at."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert


class LineEntered(Message):
    """A command line was typed and sent."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line


class Said(Message):
    """A text was sent to the model."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class Remarked(Message):
    """A widget has something to say to the person. level: as in the log."""

    def __init__(self, level: str, text: str) -> None:
        super().__init__()
        self.level, self.text = level, text


class PanelPicked(Message):
    """A panel was chosen, by focus or on the tab strip. move: the focus is to follow."""

    def __init__(self, panel: str, *, move: bool) -> None:
        super().__init__()
        self.panel, self.move = panel, move


class KeyUsed(Message):
    """A key of the keymap was pressed, clicked or chosen in the palette."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
