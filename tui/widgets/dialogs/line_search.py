"""The search through earlier command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from tui.widgets.fields import FieldInput

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


class SearchInput(FieldInput):
    """Keeps its words when Enter is pressed: the list would change under the choice."""

    async def action_submit(self) -> None:
        self.post_message(self.Submitted(self, self.value))


class LineSearch(ModalScreen[str | None]):
    """Lists earlier lines as words are typed; Enter takes the highlighted one. past: oldest first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "dismiss(None)", "close"),
        ("up", "move(-1)", "newer"),
        ("down,ctrl+r", "move(1)", "older"),
    ]

    DEFAULT_CSS = """
    LineSearch { align: center bottom; background: $background 40%; }
    LineSearch > Vertical { width: 100%; height: 60%; max-height: 16; border: round $accent;
                            background: $surface; padding: 0 1; }
    LineSearch OptionList, LineSearch OptionList:focus { border: none; height: 1fr; padding: 0;
                                                         background: $surface; }
    """

    def __init__(self, past: Sequence[str]) -> None:
        super().__init__()
        self._past = past
        self._words = ""
        self._shown: list[str] = []

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "earlier lines"
            yield OptionList()
            yield SearchInput(placeholder="words of the line")

    def on_mount(self) -> None:
        self.query_one(OptionList).can_focus = False
        self.query_one(FieldInput).focus()
        self._list("")

    def _list(self, words: str) -> None:
        self._words, self._shown = words, matching(self._past, words)
        found = self.query_one(OptionList)
        found.clear_options()
        found.add_options(Option(Text(line)) for line in self._shown)
        found.highlighted = 0 if self._shown else None

    def action_move(self, by: int) -> None:
        found = self.query_one(OptionList)
        if self._shown:
            found.highlighted = ((found.highlighted or 0) + by) % len(self._shown)

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        if event.value != self._words:
            self._list(event.value)

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        event.stop()
        if event.value != self._words:
            # Enter came right behind the letters.
            self._list(event.value)
        at = self.query_one(OptionList).highlighted
        self.dismiss(self._shown[at] if at is not None else None)

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._shown[event.option_index])
