"""The strip of panel names on terminals too small for all panels at once."""

from __future__ import annotations

from rich.text import Text
from textual import events

from tui.layout import NUMBERS
from tui.messages import PanelPicked
from tui.widgets.line import Line

NAMES = {"experts": "experts", "chat": "chat", "plan": "plan", "history": "history",
         "log": "reports", "mixer": "mixer"}  # fmt: skip
SHORT = {"history": "tree", "log": "log", "experts": "map"}
ROOM = 66
"""Columns from which on the names are written out."""


class TabStrip(Line):
    """Draws names, the visible ones bright; a click picks one."""

    DEFAULT_CSS = """
    TabStrip { height: 1; background: $panel; padding: 0 1; }
    """

    def __init__(self) -> None:
        super().__init__(id="tabs")
        self._spans: list[tuple[int, int, str]] = []

    def show(
        self, names: tuple[str, ...], visible: tuple[str, ...], marked: frozenset[str]
    ) -> None:
        """Draw `names`; `marked` ones have something to say."""
        text, self._spans = Text(no_wrap=True), []
        for name in names:
            start = text.cell_len
            title = NAMES[name] if self.app.size.width >= ROOM else SHORT.get(name, NAMES[name])
            sign = "•" if name in marked and name not in visible else " "
            style = "bold reverse" if name in visible else "dim"
            text.append(f" {NUMBERS[name]} {title}{sign}", style)
            self._spans.append((start, text.cell_len, name))
            text.append(" ")
        self.put(text)

    def on_click(self, event: events.Click) -> None:
        for start, end, name in self._spans:
            if start <= event.x - 1 < end:
                self.post_message(PanelPicked(name, move=True))
