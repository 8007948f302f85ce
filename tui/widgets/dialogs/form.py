"""The form of a command: a field for each parameter, and the command line that they make."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Input, Label, Static

from mlxfun.errors import UsageError
from tui.ports import Completion
from tui.widgets.command_line import completions
from tui.widgets.dialogs.asking import AskingScreen
from tui.widgets.dialogs.form_fields import FieldRow, FormInput
from tui.widgets.line import Line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commands.forms.form import Form


LOW = 22
"""Lines of a terminal on which the sentence about the command gives way to the fields."""
BELOW = 9
"""Lines of the form beside its fields: the frame, help, completions, the line, an error."""


class Forms(Protocol):
    """The engine as a form uses it."""

    def form(self, line: str) -> Form | None:
        """The form of a line."""

    def filled_in(self, line: str, name: str, text: str) -> str:
        """The line with another value of a parameter. Raises UsageError."""

    def complete_field(self, line: str, name: str, text: str) -> Sequence[Completion]:
        """The completions of a field."""


class FormScreen(AskingScreen[str | None]):
    """Gives the command line to run, None for none.

    form: of `line`. engine: makes forms. failed: why the line failed when it ran, "" if it did not.
    """

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "close")]

    DEFAULT_CSS = """
    FormScreen { align: center middle; background: $background 40%; }
    FormScreen > Vertical { width: 96%; max-width: 110; height: auto; max-height: 96%;
                            border: round $accent; background: $surface; padding: 0 1; }
    FormScreen VerticalScroll { height: auto; scrollbar-size-vertical: 1; }
    FormScreen #about, FormScreen #failed { color: $foreground 70%; height: auto; max-height: 3; }
    FormScreen #failed { color: $error; }
    FormScreen #help { height: 2; color: $foreground 70%; }
    FormScreen #made { height: 1; }
    FormScreen #made Label { width: 2; color: $foreground 60%; }
    FormScreen #made FieldInput { width: 1fr; }
    FormScreen #made FieldInput:focus { background: $panel; }
    """

    def __init__(self, form: Form, line: str, engine: Forms, failed: str = "") -> None:
        super().__init__()
        self._form, self._engine, self._failed = form, engine, failed
        self.line = line.strip()

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._form.command
            box.border_subtitle = "enter runs, escape closes, tab completes, space changes a choice"
            yield Static(self._form.about, id="about", markup=False)
            with VerticalScroll(can_focus=False):
                for field in self._form.fields:
                    yield FieldRow(field, partial(self._complete, field.name))
            yield Static(id="help", markup=False)
            yield Line(id="options")
            with Horizontal(id="made"):
                yield Label(":")
                yield FormInput(self.line, lambda _: (), (), strict=False, hint="", whole=False)
            yield Static(id="failed", markup=False)

    def on_mount(self) -> None:
        empty = (row for row in self._rows if row.field.required and not row.field.value)
        self.set_focus(next(empty, self._rows[0]).input)
        self._show(values=False)
        self._say(self._failed)
        for row in self._rows:
            value = row.field.value
            if len(value) > 1 and value in self._failed:
                row.complain(self._failed)
                self.set_focus(row.input)
                self._say("")
                break

    def on_resize(self, event: events.Resize) -> None:
        """The fields scroll where they do not all fit: what is below them stays in sight."""
        low = event.size.height < LOW
        self.query_one("#about", Static).display = not low
        scroll = self.query_one(VerticalScroll)
        scroll.styles.max_height = max(3, event.size.height - (BELOW if low else BELOW + 2))

    def _complete(self, name: str, text: str) -> Sequence[Completion]:
        return self._engine.complete_field(self.line, name, text)

    @property
    def _rows(self) -> list[FieldRow]:
        return list(self.query(FieldRow))

    @property
    def made(self) -> FormInput:
        """The command line that the fields make."""
        return self.query_one("#made FormInput", FormInput)

    def _row_of(self, node: object) -> FieldRow | None:
        return next((row for row in self._rows if row.input is node), None)

    # What is typed ----------------------------------------------------------------------------
    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        event.stop()
        row = self._row_of(event.input)
        if row is None:
            self._line_changed(event.value)
        elif event.value != row.field.value:
            self._field_changed(row, event.value)
        self._show_options()

    def _field_changed(self, row: FieldRow, value: str) -> None:
        try:
            self.line = self._engine.filled_in(self.line, row.field.name, value)
        except UsageError as problem:
            row.complain(str(problem))
            return
        with self.prevent(Input.Changed):
            self.made.put(self.line)
        self._read()
        self._show(values=False)

    def _line_changed(self, line: str) -> None:
        if line.strip() == self.line:
            return
        form = self._engine.form(line)
        if form is None or form.command != self._form.command:
            self._say(f"this is the form of {self._form.command}: the line must begin with that")
            return
        self.line = line.strip()
        self._read()
        self._show(values=True)

    def _read(self) -> None:
        self._form = self._engine.form(self.line) or self._form

    def _show(self, *, values: bool) -> None:
        """Show the form's problems; with `values`, what is in the fields too."""
        with self.prevent(Input.Changed):
            for row, field in zip(self._rows, self._form.fields, strict=True):
                row.show(field, value=values)
        # A problem of one field stands beside it; what is missing is said at the end.
        self._say(self._form.problem)

    def _say(self, problem: str) -> None:
        failed = self.query_one("#failed", Static)
        failed.update(f"✗ {problem}" if problem else "")
        failed.display = bool(problem)

    # Where the cursor is ----------------------------------------------------------------------
    def on_descendant_focus(self, _: events.DescendantFocus) -> None:
        row = self._row_of(self.focused)
        if row is not None:
            self.call_after_refresh(row.scroll_visible, animate=False)
        text = "the command line that the fields make; it can be edited"
        if row is not None:
            field = row.field
            more = f" One of {', '.join(field.choices)}." if field.kind == "choice" else ""
            more += " Several: with spaces between them." if field.many else ""
            text = f"{field.help.removesuffix(' Repeatable.')}{more}".strip() or f"{field.label}."
        self.query_one("#help", Static).update(text)
        self._show_options()

    def _show_options(self) -> None:
        row, shown = self._row_of(self.focused), Text()
        if row is not None and row.field.kind != "flag":
            options = self._complete(row.field.name, row.input.value)
            if [o.text for o in options] != [row.input.value]:
                shown = completions(options, hints=False)
        self.query_one("#options", Line).put(shown)

    @on(FormInput.Left)
    def _left(self, event: FormInput.Left) -> None:
        event.stop()
        fields = [*(row.input for row in self._rows), self.made]
        at = next((n for n, field in enumerate(fields) if field is self.focused), 0)
        self.set_focus(fields[(at + event.by) % len(fields)])

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        event.stop()
        for row in self._rows:
            row.bothered = True
        self._show(values=False)
        wrong = next((row for row in self._rows if row.field.problem), None)
        if wrong is not None:
            self.set_focus(wrong.input)
        elif self._form.complete:
            self.dismiss(self.line)
