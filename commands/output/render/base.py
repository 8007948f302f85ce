"""Helpers of all renderers: text without control characters, tables, notes.

Text that comes from files, models and users is shown as it is: markup in it is not obeyed, and
control characters, which could drive the terminal, are made visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlxfun.tally import DataUse
from mlxfun.text import visible

SHOWN_EXPERTS = 12  # experts of one layer listed by number before "and n more"


def text(content: str, style: str = "") -> Text:
    """`content` without markup and without control characters."""
    return Text(visible(content), style)


def new_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without a frame. numbers: the columns that are aligned to the right."""
    # No box: lines are read out by screen readers, and cost width.
    out = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    for column in columns:
        out.add_column(column, justify="right" if column in numbers else "left")
    return out


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
