"""The chat panel: the conversation and the input field."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Static

from tui import hints
from tui.input import chat_actions
from tui.messages import ChatEntered
from tui.state.app_state import AppState
from tui.state.chat_turns import Turn
from tui.text import SHOWN_SIDES
from tui.widgets.conversation.chat_input import ChatInput
from tui.widgets.conversation.transcript import Transcript
from tui.widgets.fields import Field
from tui.widgets.panel import Panel

ASK = "Press {chat} and ask something."
WELCOME = f"{ASK}\nThe experts of each token light up in the map."
UNLOADED = "A model has to be loaded first."


class ChatField(Field):
    """The prompt and the input of the chat."""

    def make(self) -> ChatInput:
        return ChatInput()


class ChatPanel(Panel):
    """Talk to the live model."""

    panel = "chat"
    title = "chat"
    about = (
        "The live model answers: the candidate while a plan is staged, the current model after "
        "{flip}. The coloured bar at the left of an answer shows which one it was. Steering and "
        "switching take effect with the next token.\n\n"
        "{escape} stops the answer; a stopped question is not part of the conversation. {to_map} "
        "moves to the map and {to_mixer} to the mixer while the answer continues, so that experts "
        "can be steered in mid-answer. {escape} again moves from the field to the conversation, "
        "where {token_left} and {token_right} move over the tokens and the experts of a token "
        "light up in the map; {brush} in the map highlights the tokens routed to the expert under "
        "its cursor. {again} asks again, {revise} edits a question and asks it, {copy} copies the "
        "answer, {talk} sets system prompt, temperature, length, seed and thinking.\n\n"
        "{both} asks current and candidate the same question, side by side: the first token at "
        "which they diverge is marked, and the strip shows the KL of the next-token distributions "
        "for every token, in nats. {token_left} and {token_right} move over the tokens of both answers, "
        "{token_side} goes to the same token of the other one.\n\n"
        "{new_line} starts a new line; pasted text keeps its lines, and its length in tokens is shown "
        "before it is sent."
    )

    DEFAULT_CSS = """
    ChatPanel #welcome { height: 1fr; content-align: center middle; text-align: center;
                         color: $foreground 70%; }
    """

    def compose(self) -> ComposeResult:
        yield Static(id="welcome")
        yield Transcript()
        yield ChatField(prompt="›", id="say")

    def __init__(self) -> None:
        super().__init__()
        self._failed = 0
        self._welcome = ""

    def entrance(self) -> Widget:
        return self.field

    @property
    def field(self) -> ChatInput:
        """The text field."""
        return self.query_one(ChatInput)

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
        self.field.placeholder = self._invitation(state) if ready else "no model yet"
        live = f"live: {SHOWN_SIDES[state.view.live]}" if state.view.plan else ""
        self.subtitle(
            " · ".join(part for part in (live, chat_actions.settings_words(state.talk)) if part)
        )
        if state.turns:
            self._give_back(state.turns[-1])

    @staticmethod
    def _invitation(state: AppState) -> str:
        if state.talk.both:
            return "ask current and candidate"
        if state.talk.revise:
            return "ask instead"
        return f"ask the {SHOWN_SIDES[state.view.live] if state.view.plan else 'model'}"

    def fill(self, text: str) -> None:
        """Put `text` into the field for editing."""
        self.field.value = text

    def _give_back(self, turn: Turn) -> None:
        """Put a text that failed back into the field."""
        failed = (
            turn.done and not turn.text and bool(turn.note) and not turn.note.startswith("stopped")
        )
        if failed and self._failed != turn.job and not self.field.value:
            self.fill(turn.prompt)
            self._failed = turn.job

    @on(ChatInput.Submitted)
    def _say(self, event: ChatInput.Submitted) -> None:
        event.stop()
        text = event.value.strip()
        if text:
            self.post_message(ChatEntered(text))
