"""The chat panel: the conversation and the field to type in."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Input, Static

from tui.messages import Said
from tui.state import AppState, Turn
from tui.widgets.fields import Field
from tui.widgets.panel import Panel
from tui.widgets.transcript import Transcript

WELCOME = "Press i and ask something.\nThe experts at work light up while it answers."


class ChatPanel(Panel):
    """Talk to the live model."""

    panel = "chat"
    title = "chat"
    about = (
        "What you type here goes to the live model: the candidate while a plan is staged, the "
        "base after f. The coloured bar at the left of an answer tells which one spoke. Steering "
        "and flipping take effect with the next token.\n\n"
        "Escape stops the answer. While tokens come, their experts light up in the heatmap."
    )

    DEFAULT_CSS = """
    ChatPanel #welcome { height: 1fr; content-align: center middle; text-align: center;
                         color: $foreground 70%; }
    """

    def compose(self) -> ComposeResult:
        yield Static(id="welcome")
        yield Transcript()
        yield Field(prompt="›", id="say")

    def __init__(self) -> None:
        super().__init__()
        self._failed = 0
        self._welcome = ""

    def entrance(self) -> Widget:
        return self.query_one("#say", Field).input

    def show(self, state: AppState) -> None:
        """Draw the conversation of `state`."""
        welcome = self.query_one("#welcome", Static)
        welcome.display = not state.turns
        words = WELCOME if state.view.model else "A model has to be loaded first."
        if words != self._welcome:
            self._welcome = words
            welcome.update(words)
        transcript = self.query_one(Transcript)
        transcript.display = bool(state.turns)
        transcript.show(state.turns)
        field = self.query_one("#say", Field)
        ready = state.view.model is not None
        side = state.view.live if state.view.plan else "model"
        field.input.placeholder = f"talk to the {side}" if ready else "no model yet"
        self.subtitle(f"live: {state.view.live}" if state.view.plan else "")
        if state.turns:
            self._give_back(state.turns[-1], field)

    def _give_back(self, turn: Turn, field: Field) -> None:
        """A text that failed goes back to the field, so that nobody types it twice."""
        failed = turn.done and not turn.text and turn.note not in ("", "stopped")
        if failed and self._failed != turn.job and not field.input.value:
            field.input.value = turn.prompt
            self._failed = turn.job

    @on(Input.Submitted)
    def _say(self, event: Input.Submitted) -> None:
        event.stop()
        text = event.value.strip()
        if text:
            self.post_message(Said(text))
