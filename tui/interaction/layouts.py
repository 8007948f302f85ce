"""Keys and drags that change the layout, which is remembered between sessions."""

from __future__ import annotations

from dataclasses import replace

from textual import on

from tui.interaction.base import KeyHandlers, Verbs
from tui.layout_file import LayoutFile
from tui.messages import Resized
from tui.state.sizes import Preset, Sizes, next_preset

SAID: dict[Preset, str] = {
    "balanced": "layout: balanced",
    "map": "layout: large map",
    "text": "layout: room for chat and reports",
}


class LayoutKeys(KeyHandlers):
    """The part of the application that changes the sizes of panels."""

    _layout_file: LayoutFile

    def _layout_verbs(self) -> Verbs:
        return {
            "layout": self._next_layout,
            "stretch_panel": lambda wider, taller: self._resize(
                self.main.stretched(int(wider), int(taller)), keep=True
            ),
        }

    def _next_layout(self) -> None:
        sizes = next_preset(self.state.sizes)
        self._resize(sizes, keep=True)
        self._say("info", SAID[sizes.preset])

    def _resize(self, sizes: Sizes, *, keep: bool) -> None:
        self._change(replace(self.state, sizes=sizes))
        if keep:
            self._layout_file.save(sizes.data())

    @on(Resized)
    def _resized(self, event: Resized) -> None:
        self._resize(event.sizes, keep=event.keep)
