"""Printing reports as text, with colour where the stream is a terminal and NO_COLOR is not set."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

from commands.render import render
from mlxfun.reports import Report


def print_report(report: Report, stream: TextIO) -> None:
    """Render `report` on `stream`. Piped text is not cut or wrapped to a made-up width."""
    terminal = stream.isatty()
    console = Console(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
        width=None if terminal else 200,
    )
    console.print(render(report))
    stream.flush()
