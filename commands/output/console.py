"""Prints reports as text, with colour where the stream is a terminal and NO_COLOR is not set.

Whatever a renderer draws, no character of its text reaches the stream that could drive a terminal.
"""

from __future__ import annotations

from io import StringIO
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from commands.output.render.base import text
from commands.output.render.dispatch import render
from mlxfun.report import Report
from mlxfun.text import visible

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
        _console(stream, None).print(_Visible(content))
    else:
        buffer = StringIO()
        _console(buffer, UNLIMITED).print(_Visible(content))
        lines = buffer.getvalue().removesuffix("\n").split("\n")
        stream.write("".join(line.rstrip() + "\n" for line in lines))
    stream.flush()


class _Visible:
    """Draws `content` with the text of every segment as `visible` gives it."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.content, options):
            if not segment.control:
                yield Segment(visible(segment.text), segment.style)


def _console(stream: TextIO, width: int | None) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)
