"""A guide as a Rich renderable, wrapped to the width it is given."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.text import Text

from commands.guides.index import source
from commands.guides.layout import plain

WIDEST = 78
"""Columns of running text that are still easy to read."""


class GuidePage:
    """One guide. Text is wrapped, code is not."""

    def __init__(self, name: str) -> None:
        self._markdown = source(name)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(plain(self._markdown, min(options.max_width, WIDEST)))
