"""Base class of the panels: frame with key and title, and a help text."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from tui.keys.key_labels import KeyNames
from tui.keys.keymap import PanelName
from tui.layout import Edge
from tui.messages import EdgeMoved, KeyUsed, PanelChosen


class Panel(Vertical):
    """A framed part of the screen. The screen finds panels by `panel`, their name in the layout.

    about: the page of help, a template with ids of keys as `KeyNames.say` takes it.
    """

    panel: ClassVar[PanelName]
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""

    # The layout mode is a class of the screen, outside what scoped rules can name.
    SCOPED_CSS = False

    DEFAULT_CSS = """
    Panel {
        border: round $foreground 25%;
        border-title-color: $foreground 70%;
        border-subtitle-color: $foreground 60%;
        padding: 0 1;
        height: 1fr;
    }
    Panel:focus-within {
        border: round $accent;
        border-title-color: $accent;
        border-title-style: bold;
    }
    .-split Panel, .-single Panel {
        border: none;
        padding: 0;
    }
    .-split ExpertsPanel {
        border-top: solid $foreground 25%;
        padding: 0;
    }
    .-split ExpertsPanel:focus-within {
        border-top: solid $accent;
    }
    """

    def __init__(self) -> None:
        super().__init__(id=self.panel)
        self._subtitle = ""
        self._entitled = ""
        self._dragged: Edge | None = None
        self.border_title = self.title

    def entitle(self, names: KeyNames, caption: str = "") -> None:
        """Write the panel's key, its title and a caption into the upper border."""
        ways = names.all(f"panel_{self.panel}")[:1]
        title = " · ".join([" ".join([*ways, self.title]), *([caption] if caption else [])])
        # Setting it redraws the whole frame of the panel.
        if title != self._entitled:
            self._entitled = title
            self.border_title = Content(title)

    def subtitle(self, text: str) -> None:
        """Write `text` into the lower border, unless it is there already."""
        if text != self._subtitle:
            self._subtitle = text
            self.border_subtitle = Content(text)

    def wanted(self) -> int | None:
        """Lines that the contents need, frame included; None for as many as there are."""
        return None

    # The frame, which the mouse moves ---------------------------------------------------------
    def _edge_at(self, x: int, y: int) -> Edge | None:
        """The side of the frame at a cell of the screen."""
        region = self.region
        if not self.styles.border_left[0] or not region.contains(x, y):
            return None
        across: Edge | None = {region.x: "left", region.right - 1: "right"}.get(x)  # type: ignore[assignment]
        return across or {region.y: "top", region.bottom - 1: "bottom"}.get(y)  # type: ignore[return-value]

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Begin to move a side."""
        self._dragged = self._edge_at(int(event.screen_x), int(event.screen_y))
        if self._dragged is not None:
            event.stop()
            self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Move it along."""
        self._drag(event, done=False)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Let it go."""
        self._drag(event, done=True)
        if self._dragged is not None:
            self._dragged = None
            self.release_mouse()

    def _drag(self, event: events.MouseEvent, *, done: bool) -> None:
        if self._dragged is not None:
            to = (int(event.screen_x), int(event.screen_y))
            self.post_message(EdgeMoved(self.panel, self._dragged, to, done=done))

    def on_click(self, event: events.Click) -> None:
        """A double click on the frame zooms."""
        if event.chain == 2 and self._edge_at(int(event.screen_x), int(event.screen_y)):
            self.post_message(PanelChosen(self.panel, move=True))
            self.post_message(KeyUsed("zoom"))

    def entrance(self) -> Widget:
        """The widget that gets the focus when the panel does."""
        raise NotImplementedError
