"""Keys of the conversation: A/B, ask again, edit a question, copy, tokens."""

from __future__ import annotations

from dataclasses import replace

from tui import clipboard
from tui.input import chat_actions
from tui.interaction.base import KeyHandlers, Verbs
from tui.state.app_state import ChatOptions
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.chat_input import ChatInput
from tui.widgets.conversation.chat_settings import ChatSettings


class ChatKeys(KeyHandlers):
    """The chat's part of the application."""

    def _chat_verbs(self) -> Verbs:
        return {
            "both": self._both,
            "converse": self._converse,
            "talk": self._open_settings,
            "token": lambda by: self._change(chat_actions.step(self.state, int(by))),
            "token_side": lambda: self._change(chat_actions.other_side(self.state)),
            "again": self._again,
            "revise": self._revise,
            "copy": self._copy,
            "new_line": self._new_line,
            "brush": lambda: self._change(replace(self.state, brush=not self.state.brush)),
        }

    def _set_options(self, options: ChatOptions) -> None:
        self._change(replace(self.state, talk=options))

    def _both(self) -> None:
        """The chat field asks current and candidate, or the live model again."""
        self._set_options(replace(self.state.talk, both=not self.state.talk.both, revise=0))
        self._go("chat")

    def _converse(self) -> None:
        """The chat field asks the live model alone."""
        self._set_options(replace(self.state.talk, both=False))
        self._go("chat")

    def _open_settings(self) -> None:
        self.push_screen(
            ChatSettings(self.state.talk, self.engine.chat_defaults), self._settings_closed
        )

    def _settings_closed(self, options: ChatOptions | None) -> None:
        if options is not None:
            self._set_options(options)

    def _again(self) -> None:
        line = chat_actions.again_line(self.state)
        if not line:
            self._say("warning", "ask again: the conversation does not hold this question")
            return
        same = not self.state.talk.temperature
        self._change(chat_actions.after_again(self.state))
        self._run(line)
        if same:
            words = (
                "asked again; at temperature 0 the answer is the same: {talk} sets the temperature"
            )
            self._say("info", self.state.names.say(words))

    def _revise(self) -> None:
        turn = chat_actions.chosen(self.state)
        back = chat_actions.back_to(self.state, turn)
        if turn is None or not back:
            self._say("warning", "edit: the conversation does not hold this question")
            return
        self._set_options(replace(self.state.talk, revise=back, both=False))
        self.main.query_one(ChatPanel).fill(turn.prompt)
        self._go("chat")

    def _new_line(self) -> None:
        field = self.main.query_one(ChatInput)
        if field.has_focus:
            field.new_line()

    def _copy(self) -> None:
        turn = chat_actions.chosen(self.state)
        if turn is None or not turn.text:
            self._say("warning", "copy: there is no answer yet")
            return
        text = f"{turn.text}\n\n{turn.other}" if turn.both else turn.text
        self._say("info", clipboard.copy(text, self.copy_to_clipboard))
