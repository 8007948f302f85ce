"""Base class of the panels: frame with key and title, and a help text."""

from __future__ import annotations

from typing import ClassVar

from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from tui.keys.key_labels import KeyNames
from tui.keys.keymap import PanelName


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

    def entrance(self) -> Widget:
        """The widget that gets the focus when the panel does."""
        raise NotImplementedError
