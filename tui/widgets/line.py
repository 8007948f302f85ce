"""A one-line label that redraws only when its text changes."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Static


class Line(Static):
    """A Static of fixed height that redraws only when its text changes.

    It never causes a new layout; several of these are refreshed in every frame.
    """

    DEFAULT_CSS = """
    Line { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._put: Text | None = None

    def put(self, text: Text | str) -> None:
        """Show `text`, without markup."""
        text = Text(text) if isinstance(text, str) else text
        # Two texts are equal to rich when their words and spans are; the style of the whole
        # counts here too.
        if self._put is None or text != self._put or text.style != self._put.style:
            self._put = text
            self.update(text, layout=False)
