"""The chat panel: the conversation and the input field."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Input, Static

from tui import hints
from tui.input import chat_actions
from tui.messages import ChatEntered
from tui.state.app_state import AppState
from tui.state.chat_turns import Turn
from tui.widgets.conversation.transcript import Transcript
from tui.widgets.fields import Field
from tui.widgets.panel import Panel

ASK = "Press {chat} and ask something."
WELCOME = f"{ASK}\nThe experts at work light up while it answers."
UNLOADED = "A model has to be loaded first."


class ChatPanel(Panel):
    """Talk to the live model."""

    panel = "chat"
    title = "chat"
    about = (
        "What you type here goes to the live model: the candidate while a plan is staged, the "
        "base after {flip}. The coloured bar at the left of an answer tells which one spoke. Steering "
        "and flipping take effect with the next token.\n\n"
        "{escape} stops the answer ({to_map} goes to the map and {to_mixer} to the mixer while it "
        "runs on, so that an expert can be steered in the middle of it); once more it leaves the "
        "field for the conversation. There {token_left} and {token_right} move over the tokens, "
        "and the experts that served a token light up in the map; {brush} in the map tints the "
        "tokens that the expert under its cursor served. {again} asks again, {revise} edits a "
        "question and asks anew, {copy} copies the answer, {talk} sets system prompt, temperature, "
        "length, seed and thinking.\n\n"
        "{both} asks base and candidate the same, side by side: the first token in which they part is "
        "marked, and the strip tells token by token how far the candidate's next word is from the "
        "base's (KL, in nats)."
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
        self.entitle(state.names)
        welcome = self.query_one("#welcome", Static)
        welcome.display = not state.turns
        ask = ASK if hints.dense(state) else WELCOME
        words = state.names.say(ask if state.view.model else UNLOADED)
        if words != self._welcome:
            self._welcome = words
            welcome.update(Text(words))
        transcript = self.query_one(Transcript)
        transcript.display = bool(state.turns)
        transcript.show(state.turns, state.token, chat_actions.tint(state))
        field = self.query_one("#say", Field)
        ready = state.view.model is not None
        field.sign("A/B ›" if state.talk.both else "›")
        field.input.placeholder = self._invitation(state) if ready else "no model yet"
        live = f"live: {state.view.live}" if state.view.plan else ""
        self.subtitle(
            " · ".join(part for part in (live, chat_actions.settings_words(state.talk)) if part)
        )
        if state.turns:
            self._give_back(state.turns[-1], field)

    @staticmethod
    def _invitation(state: AppState) -> str:
        if state.talk.both:
            return "ask base and candidate the same"
        if state.talk.revise:
            return "ask anew"
        return f"talk to the {state.view.live if state.view.plan else 'model'}"

    def fill(self, text: str) -> None:
        """Put `text` into the field for editing."""
        field = self.query_one("#say", Field).input
        field.value = text
        field.cursor_position = len(text)

    def _give_back(self, turn: Turn, field: Field) -> None:
        """Put a text that failed back into the field."""
        failed = (
            turn.done and not turn.text and bool(turn.note) and not turn.note.startswith("stopped")
        )
        if failed and self._failed != turn.job and not field.input.value:
            self.fill(turn.prompt)
            self._failed = turn.job

    @on(Input.Submitted)
    def _say(self, event: Input.Submitted) -> None:
        event.stop()
        text = event.value.strip()
        if text:
            self.post_message(ChatEntered(text))
