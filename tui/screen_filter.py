"""The last step before the terminal: no text of any widget may drive it."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from mlxfun.text import one_line


class VisibleText(LineFilter):
    """Replaces control characters in every line that is drawn, without changing its width.

    Widgets make them visible where they draw text of files and models; this is for what they miss.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """See `LineFilter.apply`."""
        if all(segment.text.isprintable() for segment in segments):
            return segments
        return [Segment(_same_width(s.text), s.style, s.control) for s in segments]


def _same_width(text: str) -> str:
    if one_line(text) == text:
        return text
    # A control character has no width: its picture would move the rest of the line.
    return "".join(c if (seen := one_line(c)) == c else seen * cell_len(c) for c in text)
