"""From tokens to pieces of text: bytes joined to characters, thinking and tool calls told apart,
the answer ended at a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from mlxfun.data.datasets import Tokenizer
from mlxfun.serving.ask import Ask, Kind, Piece

BEFORE = 4
"""Tokens of a text that decide how its continuation is written."""

_KINDS: dict[str, Kind] = {"reasoning": "reasoning", "tool": "tool"}  # anything else is text


class StopTexts:
    """Looks for texts that end an answer, across the pieces it comes in. met: the one that did."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        """What is certain to belong to the answer after `text`; nothing after a stop was met."""
        if not self._stops:
            return text
        if self.met is not None:
            return ""
        held = self._held + text
        ends = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            end, self.met = min(ends)
            self._held = ""
            return held[:end]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back: the answer is over, and it was no stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _Without:
    """A tokenizer that knows no tool calls: where a request names no tools, their text is text."""

    has_tool_calling = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class AnswerText:
    """The text of one answer, token by token. `stopped` once a stop text was met."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._detokenizer.reset()
        self._stops = StopTexts(ask.stop)
        self._one_call = ask.one_call
        self._in_call = self._called = False
        self._state: Any = None
        if not ask.parts:
            # A text that is continued keeps the space it goes on with, which is cut where an
            # answer begins.
            for token in ask.prompt[-BEFORE:]:
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        else:
            machine = make_text_state_machine(tokenizer if ask.tools else _Without(tokenizer))
            begin = getattr(tokenizer, "response_initial_state", None)
            self._state = machine.make_state(begin or ("reasoning" if ask.thinking else "normal"))

    @property
    def stopped(self) -> bool:
        """Whether the answer has met a stop text, or made the one call that it may make."""
        return self._stops.met is not None or self._called

    @property
    def met(self) -> str | None:
        """The stop text that ended it."""
        return self._stops.met

    def add(self, token: int) -> tuple[Piece, ...]:
        """What is certain after one more token."""
        self._detokenizer.add_token(token)
        return self._pieces(self._detokenizer.last_segment)

    def end(self) -> tuple[Piece, ...]:
        """The rest of the text: the answer is over."""
        if self.stopped:
            return ()
        # Once a stop is found in the rest, nothing behind it is added: `_stops` then gives nothing.
        self._detokenizer.finalize()
        found = list(self._pieces(self._detokenizer.last_segment))
        if self._state is not None:
            self._state, held, name = TextStateMachine.flush(self._state)
            found += self._sorted([(name, held)])
        if held := self._stops.rest():
            found.append(Piece("text", held))
        return tuple(found)

    def _pieces(self, text: str) -> tuple[Piece, ...]:
        if not text:
            return ()
        if self._state is None:
            return tuple(self._sorted([("normal", text)]))
        self._state, segments = TextStateMachine.split(self._state, text)
        return tuple(self._sorted(segments))

    def _sorted(self, segments: Sequence[tuple[str, str]]) -> list[Piece]:
        found = []
        for index, (name, text) in enumerate(segments):
            kind = _KINDS.get(name, "text")
            self._called = self._called or (self._one_call and self._in_call and kind != "tool")
            self._in_call = kind == "tool"
            if self._called:
                break
            said = self._stops.feed(text) if kind == "text" else text
            # An empty piece still parts two tool calls.
            if said or (kind == "text" and index + 1 < len(segments)):
                found.append(Piece(kind, said))
            if self.stopped:
                break
        return found
