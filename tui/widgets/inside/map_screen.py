"""A window with a grid from inside a forward: a cursor, and a line about the cell under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from commands.output.gradient import RGB, blend
from tui.text import shortened
from tui.widgets.inside.grid import Cell, Grid

SCALE: tuple[RGB, ...] = ((28, 28, 36), (38, 70, 108), (52, 132, 152), (222, 190, 92))
"""Backgrounds from nothing to one; the text on the brightest is dark."""
DARK, LIGHT = (16, 16, 16), (232, 232, 232)
BRIGHT = 0.75
FRAME = 6  # columns of border and padding
HEAD = 7  # lines of border, title, legend, labels and explanation


def style_of(cell: Cell, here: bool) -> Style:
    """How a cell is drawn. Without colour its strength shows in bold and dim."""
    if here:
        return Style(reverse=True, bold=True)
    if cell.missing:
        return Style(dim=True)
    ground = _hex(blend(SCALE, cell.strength))
    front = _hex(DARK if cell.strength > BRIGHT else LIGHT)
    bold, dim = cell.strength >= 0.5, cell.strength < 0.05
    return Style(color=front, bgcolor=ground, bold=bold, dim=dim, underline=cell.negative)


def window(cursor: int, count: int, room: int) -> range:
    """The places that are shown of `count` in `room` places, the cursor among them.

    >>> window(0, 10, 4), window(9, 10, 4), window(5, 10, 4), window(1, 3, 9)
    (range(0, 4), range(6, 10), range(3, 7), range(0, 3))
    """
    room = max(1, min(room, count))
    first = min(max(cursor - room // 2, 0), count - room)
    return range(first, first + room)


def drawn(grid: Grid, cursor: tuple[int, int], size: tuple[int, int]) -> Text:
    """The grid around the cursor on `size` columns and lines."""
    margin = max(map(len, grid.rows)) + 1
    columns = window(cursor[1], len(grid.columns), (size[0] - margin) // (grid.width + 1))
    rows = window(cursor[0], len(grid.rows), size[1] - 1)
    text = Text(" " * margin, no_wrap=True)
    for column in columns:
        style = "bold" if column == cursor[1] else "dim"
        label = shortened(grid.columns[column], grid.width).ljust(grid.width + 1)
        text.append(label, style)
    for row in rows:
        text.append("\n")
        text.append(grid.rows[row].ljust(margin), "bold" if row == cursor[0] else "dim")
        for column in columns:
            cell = grid.cell(row, column)
            text.append(cell.text.ljust(grid.width), style_of(cell, (row, column) == cursor))
            text.append(" ")
    return text


def pictures(grid: Grid, cursor: tuple[int, int], size: tuple[int, int]) -> Text:
    """Small maps around the cursor: a line with the name of each, and its lines below."""
    assert grid.picture is not None
    tall = -(-len(grid.picture(0, 0)) // 2)
    columns = window(cursor[1], len(grid.columns), size[0] // (grid.width + 1))
    rows = window(cursor[0], len(grid.rows), size[1] // (tall + 1))
    text = Text(no_wrap=True)
    for row in rows:
        for column in columns:
            name = grid.cell(row, column).text.ljust(grid.width)
            text.append(name, Style(reverse=(row, column) == cursor, bold=True))
            text.append(" ")
        for line in range(tall):
            text.append("\n")
            for column in columns:
                found = grid.picture(row, column)
                _append_line(text, found[2 * line : 2 * line + 2], grid.width)
        text.append("\n")
    return text


def _append_line(text: Text, lines: Sequence[Sequence[float]], width: int) -> None:
    """Two rows of a small map as one line of half blocks. Roots are shown: most weights are small."""
    upper = lines[0] if lines else ()
    lower = lines[1] if len(lines) > 1 else [0.0] * len(upper)
    for pair in zip(upper, lower, strict=True):
        front, ground = (_hex(blend(SCALE, min(1.0, x) ** 0.5)) for x in pair)
        text.append("▀", Style(color=front, bgcolor=ground))
    text.append(" " * (width - len(upper) + 1))


def _hex(rgb: RGB) -> str:
    return "#" + "".join(f"{c:02x}" for c in rgb)


class MapScreen(ModalScreen[str]):
    """Shows a grid until it is closed; closing gives the command line to run next, "" for none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,q", "close", "close"),
        ("up,k", "move(-1, 0)", "up"),
        ("down,j", "move(1, 0)", "down"),
        ("left,h", "move(0, -1)", "left"),
        ("right,l", "move(0, 1)", "right"),
        ("pageup", "move(-8, 0)", "eight up"),
        ("pagedown", "move(8, 0)", "eight down"),
        ("home", "move(0, -100000)", "first"),
        ("end", "move(0, 100000)", "last"),
        ("enter", "enter", "open"),
        ("plus,equals_sign", "turn(1, 0)", "next head"),
        ("minus", "turn(-1, 0)", "previous head"),
        ("greater_than_sign", "turn(0, 1)", "next layer"),
        ("less_than_sign", "turn(0, -1)", "previous layer"),
    ]

    DEFAULT_CSS = """
    MapScreen { align: center middle; }
    MapScreen > Vertical { width: 96%; height: 94%; border: round $accent; background: $surface;
                           padding: 0 2; }
    MapScreen #grid { height: 1fr; }
    MapScreen #title, MapScreen #cell { height: auto; max-height: 2; }
    MapScreen #legend { height: 1; color: $text-muted; }
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.cursor = grid, grid.start

    def compose(self) -> ComposeResult:
        with Vertical() as frame:
            frame.border_subtitle = "arrows move, escape closes"
            yield Static(Text(self.grid.title, "bold"), id="title")
            yield Static(id="grid")
            yield Static(id="cell")
            yield Static(Text(self.grid.legend), id="legend")

    def on_mount(self) -> None:
        self.call_after_refresh(self._draw)

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self._draw)

    def _draw(self) -> None:
        place = self.query_one("#grid", Static)
        size = (place.size.width, place.size.height)
        if self.grid.picture is not None:
            place.update(pictures(self.grid, self.cursor, size))
        else:
            place.update(drawn(self.grid, self.cursor, size))
        self.query_one("#cell", Static).update(Text(self.grid.explain(*self.cursor)))

    def action_move(self, rows: int, columns: int) -> None:
        """Move the cursor, as far as there are cells."""
        row = min(max(self.cursor[0] + rows, 0), len(self.grid.rows) - 1)
        column = min(max(self.cursor[1] + columns, 0), len(self.grid.columns) - 1)
        self.cursor = row, column
        self._draw()

    def action_enter(self) -> None:
        """Close, and run what Enter does on this cell."""
        line = self.grid.enter(*self.cursor)
        if line:
            self.dismiss(line)

    def action_turn(self, heads: int, layers: int) -> None:
        """Close, and look at another head or layer."""
        line = self.grid.turned(heads, layers)
        if line:
            self.dismiss(line)

    def action_close(self) -> None:
        """Close."""
        self.dismiss("")
