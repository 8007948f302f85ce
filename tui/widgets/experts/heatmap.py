"""The heatmap widget: layers down, experts across, drawn by line from look-up tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

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
from tui.messages import CellClicked, KeyUsed, MapLaidOut

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from tui.heat.grid import Grid, Marks
    from tui.heat.margin import Figures
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
        self._tables: dict[tuple[int, bool], HalfBlocks | Blocks] = {}
        self._widths: list[int] = []
        self._margin = 0
        self._figures: tuple[HeatModel, Figures] | None = None

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
        # A map that fits needs no scroll bars; those of the size before would take a line from it.
        overflow: Literal["hidden", "auto"] = "hidden" if self._fit else "auto"
        if self.styles.overflow_y != overflow:
            self.styles.overflow_x = self.styles.overflow_y = overflow
        size = self._room
        if self._model is None or not size.width or not size.height:
            return False
        # Numeric modules load with the first model, after the first paint.
        from tui.heat.grid import layout
        from tui.heat.margin import margin_for

        model = self._model
        self._margin = margin_for(model.experts, size.width) if self._fit else 0
        shape = (size.width, size.height, self._fit, self._margin)
        grid = layout(model.layers, model.experts, *shape)
        if grid != self._grid:
            self._grid, self._drawn, self._tables = grid, None, {}
            width = size.width if self._fit else grid.gutter + grid.columns
            self.virtual_size = Size(width, grid.lines + 1)
            edges = grid.across.edges
            self._widths = [end - start for start, end in pairwise(edges)]
        return True

    @property
    def _room(self) -> Size:
        """The space for the map: beside the scroll bars, or where it fits, for one at the right."""
        if self._fit:
            return Size(max(0, self.size.width - 1), self.size.height)
        return self.scrollable_content_region.size

    def _table(self, width: int, signed: bool) -> HalfBlocks | Blocks:
        """Segments of `width` columns by code, for the present grid and theme.

        signed: of the line that carries the signs of cells.
        """
        known = self._tables.get((width, signed))
        if known is not None:
            return known
        from tui.heat.paint import DARK, LIGHT, Blocks, HalfBlocks

        assert self._grid is not None
        ground = self.background_colors[1]
        inks = DARK if self.app.current_theme.dark else LIGHT
        inks = replace(inks, ground=(ground.r, ground.g, ground.b))
        half = self._grid.half
        made = HalfBlocks(inks, width) if half else Blocks(inks, width, marked=signed)
        self._tables[width, signed] = made
        return made

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
            first, end = (row, row + 1) if grid.half else grid.down.edges[row : row + 2]
            self.refresh_lines(1 + first, end - first)

    @property
    def _marks(self) -> Marks:
        from tui.heat.grid import corners

        return corners(self._anchor, self._cursor)

    def _refresh_cursor(self, top: int, bottom: int) -> None:
        """Repaint the lines of the layers `top` to `bottom`, where marks were or are."""
        grid = self._grid
        assert grid is not None
        self.refresh_lines(self.scroll_offset.y)  # the header is on the first visible line
        first, end = grid.lines_of(top)[0], grid.lines_of(bottom)[1]
        self.refresh_lines(1 + first, end - first)

    def _reveal(self) -> None:
        """Scroll so that the cursor's cell is on screen."""
        assert self._grid is not None
        grid, size = self._grid, self._room
        (line, bottom), (column, right) = (
            grid.lines_of(self._cursor[0]), grid.columns_of(self._cursor[1])
        )  # fmt: skip
        room = max(1, size.height - 1)
        x, y = self.scroll_offset
        if not y <= line <= bottom <= y + room:
            y = line if line < y else bottom - room
        across = max(1, size.width - grid.gutter)
        if not x <= column <= right <= x + across:
            x = column if column < x else right - across
        self.scroll_to(x, y, animate=False)

    @property
    def range_here(self) -> str:
        """The experts of the cell under the cursor and how many are to be pruned, "" for one."""
        grid, model = self._grid, self._model
        if grid is None or model is None:
            return ""
        (top, bottom), (left, right) = grid.pool_of(*self._cursor)
        if (top, left) == (bottom, right):
            return ""
        layers, ranked = model.layers, model.order is not None
        rows = f"L{layers[top]}" + (f"-{layers[bottom]}" if bottom > top else "")
        across = f"{'#' if ranked else 'E'}{left}" + (f"-{right}" if right > left else "")
        from tui.heat.model import CONDEMNED, LEVELS

        part = model.codes[top : bottom + 1, left : right + 1] // LEVELS
        going = int((part == CONDEMNED).sum())
        share = f" {going} of {part.size} to prune" if going else ""
        return f"cell {rows}:{across}{share} · "

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
        row, middle = line, True
        if not grid.half:
            row = grid.down.cell_at(line)
            start, end = grid.down.edges[row : row + 2]
            middle = line - start == (end - start - 1) // 2
        first, last = self._visible(grid)
        codes, widths = self._drawn[row, first:last].tolist(), self._widths[first:last]
        narrow, wide = min(widths), max(widths)
        tables = {width: self._table(width, middle) for width in (narrow, wide)}
        if narrow == wide:
            table = tables[wide]
            segments = [table[code] for code in codes]
        else:
            segments = [tables[width][code] for code, width in zip(codes, widths, strict=True)]
        if not grid.half and self._marked_rows(grid, row):
            self._put_marks(grid, segments, first)
        label = self._label(grid, line, base) if middle else Segment(" " * grid.gutter, base)
        aside = self._figures_on(grid, line, middle, base)
        used = grid.gutter + sum(widths) + sum(len(segment.text) for segment in aside)
        return Strip([label, *segments, *aside], used)

    def _visible(self, grid: Grid) -> tuple[int, int]:
        """The cells on screen, [first, last)."""
        if self._fit:
            return 0, len(self._widths)
        room = max(1, self._room.width - grid.gutter)
        width = self._widths[0]
        first = self.scroll_offset.x // width
        return first, min(len(self._widths), first + max(1, room // width))

    def _marked_rows(self, grid: Grid, row: int) -> bool:
        top, bottom = (grid.down.cell_of(corner[0]) for corner in self._marks)
        return top <= row <= bottom

    def _figures_on(self, grid: Grid, line: int, middle: bool, base: Style) -> list[Segment]:
        """The margin of one line."""
        if not self._margin or not middle or self._model is None:
            return []
        if self._figures is None or self._figures[0] is not self._model:
            from tui.heat.margin import figures

            self._figures = (self._model, figures(self._model))
        return [Segment(self._figures[1].text(*grid.positions_on(line)), base + Style(dim=True))]

    def _label(self, grid: Grid, line: int, base: Style) -> Segment:
        assert self._model is not None
        first, last = grid.positions_on(line)
        on = first <= self._cursor[0] <= last
        mark, position = ("▸", self._cursor[0]) if on else (" ", first)
        text = f"{self._model.layers[position]}".rjust(grid.gutter - 1) + mark
        return Segment(text, base + (Style(bold=True) if on else Style(dim=True)))

    def _put_marks(self, grid: Grid, segments: list[Segment], first: int) -> None:
        """Put brackets around what is marked; half-block maps colour it (see tui.heat.grid.cells)."""
        if not self.has_focus:
            return
        (_, left), (_, right) = self._marks
        start, end = (grid.across.cell_of(expert) - first for expert in (left, right))
        for place in range(max(0, start), min(end, len(segments) - 1) + 1):
            text, style, _ = segments[place]
            if len(text) >= 3:
                opens, closes = (
                    "[" if place == start else text[0],
                    "]" if place == end else text[-1],
                )
                text = f"{opens}{text[1:-1]}{closes}"
            else:
                text = "◆" * len(text)
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
        room, text = grid.columns, [" "] * grid.columns
        digits = len(str(self._model.experts - 1))
        each = room / self._model.experts
        every = next((2**n for n in range(16) if each * 2**n >= digits + 1), 1)
        for expert in range(0, self._model.experts, every):
            start, end = grid.columns_of(expert)
            number = str(expert)
            at = start + max(0, (end - start - len(number)) // 2)
            if at + len(number) <= room:
                text[at : at + len(number)] = number
        start, end = grid.columns_of(self._cursor[1])
        x = grid.across.edges[self._visible(grid)[0]]
        place = start + (end - start - 1) // 2
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
        if self._margin:
            from tui.heat.margin import TITLE

            segments.append(Segment(TITLE, dim))
        return Strip(segments).crop(0, self._room.width)

    @staticmethod
    def _numbered(text: list[str], place: int) -> bool:
        """Whether a number takes the place of the pointer; it is made bold instead."""
        return text[place] != " "

    # Events -----------------------------------------------------------------------------------
    def on_mount(self) -> None:
        self.watch(self.app, "theme", self._theme_changed, init=False)

    def _theme_changed(self, *_: object) -> None:
        self._tables, self._drawn = {}, None
        # The new colours reach this widget's styles with the next refresh, not before.
        self.call_after_refresh(self._again)

    def _again(self) -> None:
        if self._lay_out():
            self._repaint()
            self.refresh()
            self.post_message(MapLaidOut())

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
        if line < grid.lines and column < grid.columns:
            self.post_message(CellClicked(grid.positions_on(line)[0], grid.expert_at(column)))
            if event.chain == 2:
                self.post_message(KeyUsed("closer"))
