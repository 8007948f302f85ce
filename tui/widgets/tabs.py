"""The tab strip of panel names, for terminals too small to show all panels."""

from __future__ import annotations

from rich.text import Text
from textual import events

from tui.keys.key_labels import KeyNames
from tui.keys.keymap import PanelName
from tui.layout import Arrangement
from tui.messages import EdgeMoved, PanelChosen
from tui.widgets.line import Line

NAMES: dict[PanelName, str] = {"experts": "experts", "chat": "chat", "plan": "plan", "history": "history",
         "log": "reports", "mixer": "mixer", "serve": "serving"}  # fmt: skip
SHORT: dict[PanelName, str] = {"history": "tree", "log": "log", "experts": "map"}
ROOM = 66
"""Columns from which on the names are written out."""


class TabStrip(Line):
    """Draws panel names, visible ones highlighted; a click chooses one."""

    DEFAULT_CSS = """
    TabStrip { height: 1; background: $panel; padding: 0 1; }
    """

    def __init__(self) -> None:
        super().__init__(id="tabs")
        self._spans: list[tuple[int, int, PanelName]] = []
        self._held, self._moved = False, False

    def show(self, arrangement: Arrangement, marked: frozenset[str], keys: KeyNames) -> None:
        """Draw the tabs with their keys. marked: panels with something new."""
        text, self._spans = Text(no_wrap=True), []
        for name in arrangement.tabs:
            start = text.cell_len
            title = NAMES[name] if self.app.size.width >= ROOM else SHORT.get(name, NAMES[name])
            visible = name in arrangement.visible
            sign = "•" if name in marked and not visible else " "
            words = (*keys.all(f"panel_{name}")[:1], f"{title}{sign}")
            text.append(f" {' '.join(words)}", "bold reverse" if visible else "dim")
            self._spans.append((start, text.cell_len, name))
            text.append(" ")
        self.put(text)

    # Between two panels the strip is the edge that the mouse moves.
    def on_mouse_down(self, _: events.MouseDown) -> None:
        """Take hold of the strip."""
        self._held, self._moved = True, False
        self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Move it, and with it the experts' lower edge."""
        if self._held and (self._moved or event.delta_y):
            self._moved = True
            self._drag(event, done=False)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Let it go."""
        self.release_mouse()
        if self._held and self._moved:
            self._drag(event, done=True)
        self._held = False

    def _drag(self, event: events.MouseEvent, *, done: bool) -> None:
        to = (int(event.screen_x), int(event.screen_y))
        self.post_message(EdgeMoved("experts", "bottom", to, done=done))

    def on_click(self, event: events.Click) -> None:
        if self._moved:
            return
        for start, end, name in self._spans:
            if start <= event.x - 1 < end:
                self.post_message(PanelChosen(name, move=True))
