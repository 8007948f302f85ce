"""The heatmap widget: layers down, experts across, drawn by line from look-up tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.filter import ANSIToTruecolor, LineFilter
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.keys.keymap import bindings
from tui.messages import CellClicked

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from tui.heat.grid import Grid, Marks
    from tui.heat.model import HeatModel
    from tui.heat.paint import Blocks, HalfBlocks


class Heatmap(ScrollView, can_focus=True, inherit_bindings=False):
    """Draws a HeatModel. The first line, with expert numbers, and the layer numbers at the left
    stay where they are while the map scrolls under them."""

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("experts")]

    DEFAULT_CSS = """
    Heatmap {
        height: 1fr;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 1;
        scrollbar-gutter: stable;
        background: $background;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._model: HeatModel | None = None
        self._cursor = (0, 0)
        self._anchor = (0, 0)
        self._fit = True
        self._grid: Grid | None = None
        self._drawn: Array | None = None
        self._plain: HalfBlocks | Blocks | None = None
        self._signed: HalfBlocks | Blocks | None = None

    # What is shown ----------------------------------------------------------------------------
    def show(
        self,
        model: HeatModel,
        cursor: tuple[int, int],
        *,
        fit: bool,
        anchor: tuple[int, int] | None = None,
    ) -> None:
        """Draw `model`; only lines that differ from what is on screen are repainted.

        anchor: the corner of a marked range opposite to the cursor.
        """
        anchor = anchor or cursor
        moved, marked = cursor != self._cursor, anchor != self._anchor
        rows = {self._cursor[0], self._anchor[0], cursor[0], anchor[0]}
        self._cursor, self._anchor, self._model, self._fit = cursor, anchor, model, fit
        if not self._lay_out():
            return
        self._repaint()
        if moved or marked:
            self._refresh_cursor(min(rows), max(rows))
        if moved:
            self._reveal()

    def _lay_out(self) -> bool:
        """Fit the grid to the widget; False when there is nothing to draw yet."""
        size = self.scrollable_content_region.size
        if self._model is None or not size.width or not size.height:
            return False
        # Numeric modules load with the first model, after the first paint.
        from tui.heat.grid import layout

        grid = layout(self._model.layers, self._model.experts, size.width, size.height, self._fit)
        if grid != self._grid:
            self._grid, self._drawn, self._plain = grid, None, None
            self.virtual_size = Size(grid.gutter + grid.columns * grid.width, grid.lines + 1)
        if self._plain is None:
            self._mix()
        return True

    def _mix(self) -> None:
        """Renew the tables of segments for the present grid and theme."""
        from tui.heat.paint import DARK, LIGHT, Blocks, HalfBlocks

        assert self._grid is not None
        ground = self.background_colors[1]
        inks = DARK if self.app.current_theme.dark else LIGHT
        inks = replace(inks, ground=(ground.r, ground.g, ground.b))
        width = self._grid.width
        if self._grid.half:
            self._plain = self._signed = HalfBlocks(inks, width)
        else:
            self._plain = Blocks(inks, width, marked=False)
            self._signed = Blocks(inks, width, marked=True)

    def _repaint(self) -> None:
        from tui.heat.grid import cells, changed

        assert self._model is not None
        assert self._grid is not None
        grid, old = self._grid, self._drawn
        self._drawn = cells(self._model.codes, grid, self._marks if self.has_focus else None)
        rows = changed(old, self._drawn)
        if rows is None:
            self.refresh()
            return
        for row in rows:
            self.refresh_lines(1 + row * grid.height, grid.height)

    @property
    def _marks(self) -> Marks:
        from tui.heat.grid import corners

        return corners(self._anchor, self._cursor)

    def _refresh_cursor(self, top: int, bottom: int) -> None:
        """Repaint the lines of the layers `top` to `bottom`, where marks were or are."""
        grid = self._grid
        assert grid is not None
        self.refresh_lines(self.scroll_offset.y)  # the header is on the first visible line
        first, last = grid.line_of(top), grid.line_of(bottom) + grid.height
        self.refresh_lines(1 + first, last - first)

    def _reveal(self) -> None:
        """Scroll so that the cursor's cell is on screen."""
        assert self._grid is not None
        grid, size = self._grid, self.scrollable_content_region.size
        line, column = grid.line_of(self._cursor[0]), grid.column_of(self._cursor[1])
        room = max(1, size.height - 1)
        x, y = self.scroll_offset
        if not y <= line <= y + room - grid.height:
            y = line if line < y else line - room + grid.height
        across = max(1, size.width - grid.gutter)
        if not x <= column <= x + across - grid.width:
            x = column if column < x else column - across + grid.width
        self.scroll_to(x, y, animate=False)

    # Drawing ----------------------------------------------------------------------------------
    def get_line_filters(self) -> Sequence[LineFilter]:
        """The application's filters without the one that converts ANSI colours: cells are true-colour."""
        return [f for f in super().get_line_filters() if not isinstance(f, ANSIToTruecolor)]

    def render_line(self, y: int) -> Strip:
        """One line of the window."""
        base = self.rich_style
        grid, width = self._grid, self.size.width
        if grid is None or self._drawn is None:
            return Strip.blank(width, base)
        if y == 0:
            return self._header(grid, base).adjust_cell_length(width, base)
        line = y - 1 + self.scroll_offset.y
        if line >= grid.lines:
            return Strip.blank(width, base)
        return self._line(grid, line, base).adjust_cell_length(width, base)

    def _line(self, grid: Grid, line: int, base: Style) -> Strip:
        assert self._drawn is not None
        assert self._plain is not None
        assert self._signed is not None
        row, inner = divmod(line, grid.height)
        middle = inner == (grid.height - 1) // 2
        table = self._signed if middle else self._plain
        first = self.scroll_offset.x // grid.width
        shown = min(grid.columns - first, self._across(grid) // grid.width)
        codes = self._drawn[row, first : first + shown].tolist()
        segments = [table[code] for code in codes]
        if not grid.half and self._marks[0][0] <= row <= self._marks[1][0]:
            self._put_marks(grid, segments, first)
        label = self._label(grid, row, base) if middle else Segment(" " * grid.gutter, base)
        return Strip([label, *segments], grid.gutter + len(segments) * grid.width)

    def _across(self, grid: Grid) -> int:
        return max(1, self.scrollable_content_region.width - grid.gutter)

    def _cursor_line(self, grid: Grid) -> int:
        return self._cursor[0] // 2 if grid.half else self._cursor[0]

    def _label(self, grid: Grid, row: int, base: Style) -> Segment:
        assert self._model is not None
        position = row * 2 if grid.half else row
        on = self._cursor_line(grid) == row
        if on:
            position = self._cursor[0]
        mark = "▸" if on else " "
        text = f"{self._model.layers[position]}".rjust(grid.gutter - 1) + mark
        return Segment(text, base + (Style(bold=True) if on else Style(dim=True)))

    def _put_marks(self, grid: Grid, segments: list[Segment], first: int) -> None:
        """Put brackets around what is marked; half-block maps colour it (see tui.heat.grid.cells)."""
        if not self.has_focus:
            return
        (_, left), (_, right) = self._marks
        start, end = left // grid.pool - first, right // grid.pool - first
        for place in range(max(0, start), min(end, len(segments) - 1) + 1):
            text, style, _ = segments[place]
            if grid.width >= 3:
                opens, closes = (
                    "[" if place == start else text[0],
                    "]" if place == end else text[-1],
                )
                text = f"{opens}{text[1:-1]}{closes}"
            else:
                text = "◆" * grid.width
            segments[place] = Segment(text, (style or Style()) + self._cursor_ink(style))

    def _cursor_ink(self, style: Style | None) -> Style:
        """The colour of brackets: orange where that has contrast, else black or white."""
        from tui.heat.paint import DARK, LIGHT, luma

        ink = (DARK if self.app.current_theme.dark else LIGHT).cursor
        back = style.bgcolor.triplet if style and style.bgcolor else None
        if back is not None and abs(luma(ink) - luma(back)) < 70:
            ink = (0, 0, 0) if luma(back) > 127 else (255, 255, 255)
        return Style(color=Color.from_rgb(*ink), bold=True)

    def _header(self, grid: Grid, base: Style) -> Strip:
        """Expert numbers, as many as fit, and a pointer above the cursor's column."""
        assert self._model is not None
        room = grid.columns * grid.width
        text = [" "] * room
        digits = len(str(self._model.experts - 1))
        every = max(1, -(-(digits + 1) // grid.width))
        every = next((n for n in (1, 2, 4, 8, 16, 32, 64) if n >= every), 64)
        for column in range(0, grid.columns, every):
            number = str(column * grid.pool)
            at = column * grid.width + (max(0, (grid.width - len(number)) // 2))
            if at + len(number) <= room:
                text[at : at + len(number)] = number
        x = self.scroll_offset.x // grid.width * grid.width
        place = grid.column_of(self._cursor[1]) + (grid.width - 1) // 2
        pieces = "".join(text)
        dim, loud = base + Style(dim=True), base + Style(bold=True)
        segments = [
            Segment(("E" if self._model.order is None else "#").rjust(grid.gutter - 1) + " ", dim)
        ]
        if x <= place < room:
            pointer = "▾" if not self._numbered(text, place) else text[place]
            segments += [Segment(pieces[x:place], dim), Segment(pointer, loud)]
            segments.append(Segment(pieces[place + 1 :], dim))
        else:
            segments.append(Segment(pieces[x:], dim))
        return Strip(segments).crop(0, self.scrollable_content_region.width)

    @staticmethod
    def _numbered(text: list[str], place: int) -> bool:
        """Whether a number takes the place of the pointer; it is made bold instead."""
        return text[place] != " "

    # Events -----------------------------------------------------------------------------------
    def on_mount(self) -> None:
        self.watch(self.app, "theme", self._theme_changed, init=False)

    def _theme_changed(self, *_: object) -> None:
        self._plain = self._drawn = None
        # The new colours reach this widget's styles with the next refresh, not before.
        self.call_after_refresh(self._again)

    def _again(self) -> None:
        if self._lay_out():
            self._repaint()
            self.refresh()

    def on_resize(self, _: events.Resize) -> None:
        self._again()

    def on_focus(self) -> None:
        self._again()

    def on_blur(self) -> None:
        self._again()

    def on_click(self, event: events.Click) -> None:
        grid = self._grid
        if grid is None or event.y < 1 or event.x < grid.gutter:
            return
        line = event.y - 1 + self.scroll_offset.y
        column = event.x - grid.gutter + self.scroll_offset.x
        if line < grid.lines and column < grid.columns * grid.width:
            self.post_message(CellClicked(grid.position_at(line), grid.expert_at(column)))
