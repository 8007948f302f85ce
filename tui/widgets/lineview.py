"""A scrolling column of text blocks, drawn by line; only changed blocks are rendered again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

Lines = list[list[Segment]]

LAYOUTS = 5
"""Refreshes that a view waits for its new height to count for scrolling."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block of lines.

    key: its identity. source: what it is made of, compared by identity. render: its lines for a
    width in columns.
    """

    key: Hashable
    source: object
    render: Callable[[int], Lines]


class LineView(ScrollView, can_focus=True):
    """Draws blocks, only the changed ones anew.

    to_head: a new last block is shown from its first line if it does not fit; otherwise the view
    follows the end, unless the reader scrolled away from it.
    """

    to_head: bool = False

    DEFAULT_CSS = """
    LineView { height: 1fr; scrollbar-size-vertical: 1; background: $background;
               overflow-x: hidden; scrollbar-gutter: stable; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: Sequence[Block] = ()
        self._cache: dict[Hashable, tuple[object, int, list[Strip]]] = {}
        self._lines: list[Strip] = []
        self._following = True
        self._last = 0  # the line on which the last block begins
        self._starts: list[int] = []  # the lines on which the blocks begin

    @property
    def line_count(self) -> int:
        """Lines of all blocks together."""
        return len(self._lines)

    def show_blocks(self, blocks: Sequence[Block]) -> None:
        """Draw `blocks`, oldest first."""
        self._blocks = blocks
        self._rebuild()

    def _rebuild(self) -> None:
        width = self.scrollable_content_region.width
        if not width:
            return
        cache: dict[Hashable, tuple[object, int, list[Strip]]] = {}
        self._lines, self._last, self._starts = [], 0, []
        for block in self._blocks:
            known = self._cache.get(block.key)
            if known is None or known[0] is not block.source or known[1] != width:
                known = (block.source, width, [Strip(line) for line in block.render(width)])
            cache[block.key] = known
            self._last = len(self._lines)
            self._starts.append(self._last)
            self._lines += known[2]
        self._cache = cache
        self.virtual_size = Size(width, len(self._lines))
        self.refresh()
        if self._following or self.to_head:
            # The new height counts for scrolling only after the next layout.
            self.call_after_refresh(self._place)

    def _place(self, tries: int = LAYOUTS) -> None:
        if not self.to_head or len(self._lines) - self._last <= self.size.height:
            self.scroll_end(animate=False)
            return
        self.scroll_to(y=self._last, animate=False)
        if self.scroll_y < self._last and tries:
            # A panel that has just come into view: the layout is still to come.
            self.call_after_refresh(self._place, tries - 1)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        # If the reader has scrolled up, stay there; at the end, follow new lines.
        self._following = new_value >= self.max_scroll_y - 1

    def render_line(self, y: int) -> Strip:
        """One line of the window."""
        line, width, base = y + self.scroll_offset.y, self.size.width, self.rich_style
        if line >= len(self._lines):
            return Strip.blank(width, base)
        shown = self.finished(line, self._lines[line])
        return shown.apply_style(base).adjust_cell_length(width, base)

    def finished(self, line: int, strip: Strip) -> Strip:
        """The strip of a line as it is drawn now, for marks that come and go."""
        return strip

    def text_at(self, line: int) -> str:
        """The text of one line."""
        return self._lines[line].text

    def on_resize(self, _: events.Resize) -> None:
        self._rebuild()
