"""Helpers of all renderers: text without control characters, tables, notes.

Text that comes from files, models and users is shown as it is: markup in it is not obeyed, and
control characters, which could drive the terminal, are made visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlxfun.tally import DataUse
from mlxfun.text import visible

LEAST_TEXT = 12
"""Columns that a text needs at least to be read in a table."""
MOST_CARDS = 200
SHOWN_EXPERTS = 12  # experts of one layer listed by number before "and n more"


def text(content: str, style: str = "") -> Text:
    """`content` without markup and without control characters."""
    return Text(visible(content), style)


def new_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without a frame. numbers: the columns that are aligned to the right."""
    # No box: lines are read out by screen readers, and cost width.
    out = Fitting(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    for column in columns:
        figures = column in numbers
        out.add_column(column, justify="right" if figures else "left", no_wrap=figures)
    return out


class Fitting(Table):
    """A table that becomes cards where it does not fit: Rich would cut the digits of figures.

    A card is a row: its first cell, and behind it each other cell with its column's title.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.row_count and self._least(console, options) > options.max_width:
            yield from self._cards(console, options.max_width)
        else:
            yield from super().__rich_console__(console, options)

    def _least(self, console: Console, options: ConsoleOptions) -> int:
        """Columns below which a figure or half a text would be lost."""
        wide = options.update(max_width=10_000)
        total = 2 * (len(self.columns) - 1)  # between the columns
        for column in self.columns:
            cells = [column.header, *column.cells] if self.show_header else column.cells
            room = max((Measurement.get(console, wide, cell).maximum for cell in cells), default=0)
            total += room if column.no_wrap else min(room, LEAST_TEXT)
        return total

    def _cards(self, console: Console, width: int) -> RenderResult:
        titles = [_plain(console, column.header) for column in self.columns]
        rows = zip(*(list(column.cells) for column in self.columns), strict=True)
        for number, row in enumerate(rows):
            yield from _card(console, titles, row, width) if number < MOST_CARDS else ()
        if self.row_count > MOST_CARDS:
            yield Text(f"and {self.row_count - MOST_CARDS:,} more rows", style="dim")


def _card(
    console: Console, titles: Sequence[str], row: Sequence[RenderableType], width: int
) -> Iterable[Text]:
    """One row, figures beside their titles and never parted from them."""
    line, first = Text(), True
    for title, cell in zip(titles, row, strict=True):
        said = _plain(console, cell)
        if not said:
            continue
        piece = (
            Text(said, style="bold")
            if first
            else Text.assemble((f"{title} " if title else "", "dim"), said)
        )
        if line and line.cell_len + 2 + piece.cell_len > width:
            yield line
            line = Text("  ")
        line.append("" if first or not line.plain.strip() else "  ").append_text(piece)
        first = False
    if line:
        yield line


def _plain(console: Console, cell: RenderableType) -> str:
    """A cell as text on one line."""
    if isinstance(cell, Text):
        return cell.plain
    return console.render_str(cell).plain if isinstance(cell, str) else ""


def pairs(rows: Iterable[tuple[str, Any]]) -> Table:
    """Names and values, without those that are None."""
    out = Table(box=None, pad_edge=False, show_header=False)
    out.add_column(style="dim")
    out.add_column()
    for name, value in rows:
        if value is not None:
            out.add_row(text(name), text(str(value)))
    return out


def with_notes(head: RenderableType, notes: Iterable[str]) -> RenderableType:
    """`head` with a line for each note."""
    lines = [text(f"note: {note}", "yellow") for note in notes]
    return Group(head, *lines) if lines else head


def with_inputs(head: RenderableType, inputs: Sequence[DataUse]) -> RenderableType:
    """`head` with a line for each data set that was read."""
    return (
        Group(head, *(text(f"data: {use.summary()}", "dim") for use in inputs)) if inputs else head
    )


def experts_text(experts: Sequence[int], most: int = SHOWN_EXPERTS) -> str:
    """Expert numbers, the end left out when there are many.

    >>> experts_text((1, 2, 5), most=2)
    '1 2 and 1 more'
    """
    shown = " ".join(str(e) for e in experts[:most])
    return shown + (f" and {len(experts) - most} more" if len(experts) > most else "")
