"""Base class of the lists in panels: no frame, and Enter or a click does what a key of the keymap does."""

from __future__ import annotations

from typing import ClassVar

from textual.widgets import OptionList

from tui.messages import KeyUsed


class PanelList(OptionList, inherit_bindings=False):
    """A list that fills its panel. chosen: the id of the key that a click on a row stands for."""

    chosen: ClassVar[str]

    DEFAULT_CSS = """
    PanelList, PanelList:focus { border: none; padding: 0; height: 1fr; background: $background;
                                 background-tint: $foreground 0%; text-wrap: nowrap; text-overflow: ellipsis;
                                 scrollbar-size-vertical: 1; }
    """

    def on_resize(self) -> None:
        """Keep the row under the cursor in sight when the panels share the screen anew."""
        self.call_after_refresh(self.scroll_to_highlight)

    def action_select(self) -> None:
        # What a mouse click does; the key itself is in the keymap.
        self.post_message(KeyUsed(self.chosen))
