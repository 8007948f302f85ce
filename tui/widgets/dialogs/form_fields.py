"""The rows of a form: a label, a field with completion, and what is wrong with its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import Label

from tui.ports import Completion
from tui.widgets.fields import FieldInput
from tui.widgets.line import Line

if TYPE_CHECKING:
    from commands.forms.form import Field

Completer = Callable[[str], Sequence[Completion]]
"""The completions of what is typed into a field."""


class Best(Suggester):
    """Shows the best completion of a field, dim, behind the cursor."""

    def __init__(self, complete: Completer) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._complete = complete

    async def get_suggestion(self, value: str) -> str | None:
        if not value:
            return None
        wholes = (value[: option.start] + option.text for option in self._complete(value))
        return next((w for w in wholes if w.startswith(value) and w != value), None)


class FormInput(FieldInput):
    """Tab completes or goes on, up and down go from field to field, space changes a choice.

    choices: the values of a field that has few. strict: no other value can be typed. whole: what
    is typed first replaces a value that was there; the arrows and End go on with it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        ("tab", "complete(1)", "complete"),
        ("shift+tab", "go(-1)", "field above"),
        ("up", "go(-1)", "field above"),
        ("down", "go(1)", "field below"),
    ]

    class Left(Message):
        """The cursor goes on to the field `by` places further down."""

        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

    def __init__(
        self,
        value: str,
        complete: Completer,
        choices: Sequence[str],
        *,
        strict: bool,
        hint: str,
        whole: bool = True,
    ) -> None:
        super().__init__(value, placeholder=hint, suggester=Best(complete), select_on_focus=whole)
        self._complete, self._choices, self._strict = complete, choices, strict
        self._round: tuple[str, str, int] | None = None  # typed, now, which

    def action_go(self, by: int) -> None:
        self.post_message(self.Left(by))

    def action_complete(self, step: int) -> None:
        typed, which = self.value, 0
        again = self._round is not None and self._round[1] == self.value
        if again and self._round is not None:
            typed, which = self._round[0], self._round[2] + step
        options = [typed[: o.start] + o.text for o in self._complete(typed)] if typed else []
        done = not options or (len(options) == 1 and options[0] == self.value)
        if done or (not again and self.value in options):
            self.action_go(1)
            return
        self.put(options[which % len(options)])
        self._round = (typed, self.value, which)

    def put(self, value: str) -> None:
        """Put `value` into the field, the cursor behind it."""
        self.value = value
        self.cursor_position = len(value)

    async def action_submit(self) -> None:
        self.post_message(self.Submitted(self, self.value))

    async def _on_key(self, event: events.Key) -> None:
        change = self._choices and (event.key == "space" or (self._strict and event.is_printable))
        if change:
            event.stop()
            event.prevent_default()
            if event.key == "space":
                values = ["", *self._choices]
                at = values.index(self.value) if self.value in values else 0
                self.put(values[(at + 1) % len(values)])
            return
        if self._strict and event.key == "backspace":
            event.stop()
            event.prevent_default()
            self.put("")
            return
        await super()._on_key(event)


class FieldRow(Vertical):
    """One field of a form."""

    DEFAULT_CSS = """
    FieldRow { height: auto; }
    FieldRow Horizontal { height: 1; }
    FieldRow Label { width: 27; height: 1; color: $foreground 70%; text-wrap: nowrap;
                     text-overflow: ellipsis; }
    FieldRow.-required Label { color: $foreground; text-style: bold; }
    FieldRow:focus-within Label { color: $accent; }
    FieldRow FieldInput { width: 1fr; }
    FieldRow FieldInput:focus { background: $panel; }
    FieldRow .wrong { color: $error; padding: 0 0 0 27; display: none; }
    FieldRow.-wrong .wrong { display: block; }
    """

    def __init__(self, field: Field, complete: Completer) -> None:
        super().__init__()
        self.field = field
        self._complete = complete
        self.set_class(field.required, "-required")
        self.bothered = False
        """Whether an empty required field is called wrong: not before Enter."""

    def compose(self) -> ComposeResult:
        field = self.field
        needed = ["required"] if field.required else []
        hint = ". ".join([*needed, *([field.help] if field.help else [])])
        with Horizontal():
            yield Label(f"{field.label}{' *' if field.required else ''}", markup=False)
            yield FormInput(
                field.value,
                self._complete,
                field.choices if field.kind != "text" else (),
                strict=field.kind == "flag",
                hint=hint,
            )
        line = Line()
        line.add_class("wrong")
        yield line

    @property
    def input(self) -> FormInput:
        """The field itself."""
        return self.query_one(FormInput)

    def show(self, field: Field, *, value: bool) -> None:
        """Show what is wrong with the field; with `value`, its value too."""
        self.field = field
        if value and self.input.value != field.value:
            self.input.put(field.value)
        self.complain(field.problem if field.value or self.bothered else "")

    def complain(self, problem: str) -> None:
        """Say what is wrong with the value, "" for nothing."""
        self.set_class(bool(problem), "-wrong")
        self.query_one(".wrong", Line).put(Text(problem))
