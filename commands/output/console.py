"""Prints reports as text, with colour where the stream is a terminal and NO_COLOR is not set."""

from __future__ import annotations

from io import StringIO
from typing import TextIO

from rich.console import Console, RenderableType

from commands.output.render.base import text
from commands.output.render.dispatch import render
from mlxfun.report import Report

UNLIMITED = 10_000  # columns: text for a file or a pipe is not wrapped to a made-up width


def print_report(report: Report, stream: TextIO) -> None:
    """Render `report` on `stream`."""
    print_text(render(report), stream)


def print_dim(content: str, stream: TextIO) -> None:
    """Print a line dimmed."""
    print_text(text(content, "dim"), stream)


def print_text(content: RenderableType, stream: TextIO) -> None:
    """Print wrapped to a terminal's width; elsewhere unwrapped and without trailing blanks."""
    if stream.isatty():
        _console(stream, None).print(content)
    else:
        buffer = StringIO()
        _console(buffer, UNLIMITED).print(content)
        lines = (line.rstrip() + "\n" for line in buffer.getvalue().splitlines())
        stream.write("".join(lines))
    stream.flush()


def _console(stream: TextIO, width: int | None) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)
