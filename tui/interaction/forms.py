"""Windows that make a command line: the form of a command, the list of commands, the list of models."""

from __future__ import annotations

from rich.text import Text

from mlxfun.events import JobEnded
from tui.interaction.base import KeyHandlers, Verbs
from tui.widgets.dialogs.form import FormScreen
from tui.widgets.dialogs.pick import Choice, PickScreen

SOON = 5.0
"""Seconds within which a line that failed opens its form again: later the user is elsewhere."""


class FormKeys(KeyHandlers):
    """The part of the application that fills in command lines."""

    _formed = 0  # the job whose line came from a form

    def _form_verbs(self) -> Verbs:
        return {"form": self._form_here}

    def _form_here(self) -> None:
        """The form of the line that is typed, else a list of all forms."""
        typed = self.main.command.input.value.strip()
        if not typed or not self.open_form(typed):
            self._choose_form()

    def _choose_form(self) -> None:
        rows = [row for row in self.state.rows if self.engine.form(row.name) is not None]
        width = max((len(row.name) for row in rows), default=0)
        choices = []
        for row in rows:
            shown = Text(f"{row.name:<{width}}  {row.help}", "" if row.enabled else "dim")
            choices.append(Choice(row.name, shown, f"not now: {row.reason}" if row.reason else ""))

        def taken(name: str | None) -> None:
            if name is not None:
                self.open_form(name)

        self.push_screen(PickScreen("forms", choices, "type to filter"), taken)

    def open_form(self, line: str, failed: str = "") -> bool:
        """Open the form of a line, a command's name alone prefilled; whether there is one."""
        if line in {row.name for row in self.state.rows}:
            line = self._last_use(line)
        form = self.engine.form(line)
        if form is None:
            return False
        self.push_screen(FormScreen(form, line, self.engine, failed), self._form_taken)
        return True

    def _last_use(self, name: str) -> str:
        """The newest line of this command that makes sense, its name where there is none."""
        past = [*self.main.command.input.past, *self.state.lines]
        for line in reversed(past):
            form = self.engine.form(line) if line.startswith(f"{name} ") else None
            if form is not None and form.command == name and form.complete:
                return line
        return name

    def _form_taken(self, line: str | None) -> None:
        if line is None:
            return
        self.main.command.input.fill("")
        self.main.command.input.remember(line)
        self.enter_line(line)
        self._formed = self._typed

    def _form_again(self, event: JobEnded) -> bool:
        """Open the form of a line again that failed at once; whether that was done."""
        idle = self.screen is self.main and not self.main.in_field
        if event.job != self._formed or not idle or event.seconds > SOON or event.cancelled:
            return False
        return event.error is not None and self.open_form(event.line, event.error)
