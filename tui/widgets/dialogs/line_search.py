"""The search through earlier command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import BindingType

from tui.widgets.dialogs.pick import Choice, PickScreen

MOST = 50


def matching(past: Sequence[str], words: str) -> list[str]:
    """Lines that hold every word, the newest first, each once.

    >>> matching(["prune --n-prune 4", "info", "prune --n-prune 8", "info"], "n-prune pr")
    ['prune --n-prune 8', 'prune --n-prune 4']
    """
    found = dict.fromkeys(
        line for line in reversed(past) if all(word in line for word in words.split())
    )
    return list(found)[:MOST]


class LineSearch(PickScreen):
    """Lists earlier lines as words are typed; Enter takes the highlighted one. past: oldest first."""

    # As in a shell: the key that opened it goes on to older lines.
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+r", "move(1)", "older")]

    DEFAULT_CSS = """
    LineSearch { align: center bottom; }
    LineSearch > Vertical { width: 100%; max-width: 100%; height: 60%; max-height: 16; }
    LineSearch OptionList, LineSearch OptionList:focus { height: 1fr; }
    """

    def __init__(self, past: Sequence[str]) -> None:
        super().__init__("earlier lines", (), "words of the line")
        self._past = past

    def matching(self, words: str) -> list[Choice]:
        return [Choice(line, Text(line)) for line in matching(self._past, words)]
