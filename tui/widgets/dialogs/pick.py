"""A window with a list: typing filters it, Enter takes the highlighted row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui.widgets.dialogs.asking import AskingScreen
from tui.widgets.fields import FieldInput


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of the list. value: what is taken. shown: the row. about: a text for the row under the
    cursor, "" for none."""

    value: str
    shown: Text
    about: str = ""

    @property
    def words(self) -> str:
        """What is searched, in lower case."""
        return f"{self.value} {self.shown.plain} {self.about}".lower()


def filtered(choices: Sequence[Choice], words: str) -> list[Choice]:
    """The choices that hold every word, in any case.

    >>> [c.value for c in filtered([Choice("a b", Text("x")), Choice("b", Text("y"))], "Y B")]
    ['b']
    """
    wanted = words.lower().split()
    return [choice for choice in choices if all(word in choice.words for word in wanted)]


class PickInput(FieldInput):
    """Keeps its words when Enter is pressed: the list would change under the choice."""

    # Of the field itself: Textual's would scroll it.
    BINDINGS: ClassVar[list[BindingType]] = [
        ("up", "screen.move(-1)", "up"),
        ("down", "screen.move(1)", "down"),
        ("pageup", "screen.move(-8)", "page up"),
        ("pagedown", "screen.move(8)", "page down"),
    ]

    async def action_submit(self) -> None:
        self.post_message(self.Submitted(self, self.value))


class PickScreen(AskingScreen[str | None]):
    """Lists choices as words are typed; gives the value that is taken, None for none.

    title: of the window. hint: the field's placeholder.
    """

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "close")]

    DEFAULT_CSS = """
    PickScreen { align: center middle; background: $background 40%; }
    PickScreen > Vertical { width: 94%; max-width: 110; height: auto; max-height: 80%;
                            border: round $accent; background: $surface; padding: 0 1; }
    PickScreen OptionList, PickScreen OptionList:focus {
        border: none; height: auto; padding: 0; background: $surface;
        text-wrap: nowrap; text-overflow: ellipsis; }
    PickScreen #about { height: auto; max-height: 4; color: $foreground 70%; }
    """

    def __init__(self, title: str, choices: Sequence[Choice], hint: str) -> None:
        super().__init__()
        self._title, self._choices, self._hint = title, choices, hint
        self._words = ""
        self._shown: list[Choice] = []

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            box.border_subtitle = "enter selects, escape closes, typing filters"
            yield OptionList()
            yield Static(id="about", markup=False)
            yield PickInput(placeholder=self._hint)

    def on_mount(self) -> None:
        self.query_one(OptionList).can_focus = False
        super().on_mount()
        self._list("")

    def on_resize(self, event: events.Resize) -> None:
        """The list scrolls where it does not fit: the field stays in sight."""
        self.query_one(OptionList).styles.max_height = max(2, event.size.height * 8 // 10 - 6)

    def matching(self, words: str) -> list[Choice]:
        """The choices for what was typed."""
        return filtered(self._choices, words)

    def _list(self, words: str) -> None:
        self._words, self._shown = words, self.matching(words)
        found = self.query_one(OptionList)
        found.clear_options()
        found.add_options(Option(choice.shown) for choice in self._shown)
        found.highlighted = 0 if self._shown else None
        self._tell()

    def _tell(self) -> None:
        at = self.query_one(OptionList).highlighted
        about = self._shown[at].about if at is not None else "nothing has all these words"
        self.query_one("#about", Static).update(about)
        self.query_one("#about", Static).display = bool(about)

    def action_move(self, by: int) -> None:
        found = self.query_one(OptionList)
        if self._shown:
            at = (found.highlighted or 0) + by
            last = len(self._shown) - 1
            # One step goes round, a page stops at the end.
            found.highlighted = at % (last + 1) if abs(by) == 1 else max(0, min(at, last))
            self._tell()

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
        if at is not None:
            self.dismiss(self._shown[at].value)

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        self._tell()

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._shown[event.option_index].value)

    def on_click(self, event: events.Click) -> None:
        """A click beside the window closes it."""
        if event.widget is self:
            self.dismiss(None)
