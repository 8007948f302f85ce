"""An answer as all APIs need it: text, thinking and whole tool calls, in order, as they come."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxfun.data.datasets import Tokenizer
from mlxfun.serving.ask import (
    Ask,
    Ended,
    EndReason,
    Failed,
    Frame,
    Piece,
    Reading,
    Said,
    TokenLogprob,
    TokenRouting,
)
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.tickets import Gone, Ticket
from mlxfun.serving.http.tools import ToolCall, parse_calls, salvaged


@dataclass(frozen=True, slots=True)
class Turn:
    """A checked request. tools: those that may be called. answers: how many are wanted."""

    ask: Ask
    tokenizer: Tokenizer
    tools: tuple[dict[str, Any], ...] = ()
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer: text, thinking, or a whole call."""

    kind: Literal["text", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None


@dataclass(slots=True)
class Delta:
    """What is new. read: how far the prompt is read, if that is all there is to say. reason: set in
    the last one, with the number of tokens in the whole answer, and the stop text that ended it.
    thought: how many of the tokens were thinking."""

    parts: list[Part] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    routing: list[TokenRouting] = field(default_factory=list)
    read: tuple[int, int] | None = None
    reason: EndReason | None = None
    tokens: int = 0
    stop: str | None = None
    thought: int = 0

    def add(self, part: Part) -> None:
        """Append a part, joined to the last one if both are text of one kind."""
        last = self.parts[-1] if self.parts else None
        if last is not None and last.kind == part.kind != "call":
            self.parts[-1] = Part(part.kind, last.text + part.text)
        elif part.text or part.call is not None:
            self.parts.append(part)

    def joined(self, kind: Literal["text", "reasoning"]) -> str:
        """All text of a kind."""
        return "".join(part.text for part in self.parts if part.kind == kind)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls."""
        return [part.call for part in self.parts if part.call is not None]


class Assembly:
    """Makes parts of pieces: the text of a call is held back until the call is complete."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._call: str | None = None

    def add(self, pieces: Sequence[Piece], delta: Delta) -> None:
        """Add what `pieces` complete to `delta`."""
        for piece in pieces:
            if piece.kind == "tool":
                self._call = (self._call or "") + piece.text
                continue
            self._complete(delta, cut=False)
            delta.add(Part(piece.kind, piece.text))

    def end(self, delta: Delta) -> None:
        """The answer is over."""
        self._complete(delta, cut=True)

    def _complete(self, delta: Delta, cut: bool) -> None:
        text, self._call = self._call, None
        if text is None:
            return
        calls = parse_calls(text, self._turn.tokenizer, self._turn.tools)
        if calls is None and cut and (saved := salvaged(text)) is not None:
            calls = [saved]
        if calls is None:
            delta.add(Part("text", text))  # no call, but nothing shall be lost
        for call in calls or ():
            delta.add(Part("call", call=call))


async def flow(
    ticket: Ticket, turn: Turn, seconds: float = math.inf
) -> AsyncIterator[Delta | None]:
    """The deltas of an answer; None when nothing came for so long. Raises Bad when it fails, Gone
    when the client goes away."""
    assembly = Assembly(turn)
    async for frames in ticket.frames(seconds):
        if not frames:
            yield None
            continue
        delta = Delta()
        for frame in frames:
            _take(frame, assembly, delta)
        yield delta
        if delta.reason is not None:
            return
    raise Gone


def _take(frame: Frame, assembly: Assembly, delta: Delta) -> None:
    match frame:
        case Failed():
            raise Bad(frame.message, status=frame.status)
        case Reading():
            delta.read = (frame.done, frame.total)
        case Said():
            delta.read = None
            delta.thought += bool(frame.pieces) and frame.pieces[-1].kind == "reasoning"
            assembly.add(frame.pieces, delta)
            delta.logprobs += [frame.logprob] if frame.logprob is not None else []
            delta.routing += [frame.routing] if frame.routing is not None else []
        case Ended():
            assembly.add(frame.pieces, delta)
            assembly.end(delta)
            delta.read, delta.reason, delta.tokens = None, frame.reason, frame.completion_tokens
            delta.stop = frame.stop
        case _:
            pass


async def whole(ticket: Ticket, turn: Turn) -> Delta:
    """All of an answer in one. Raises Bad, Gone."""
    found = Delta()
    async for delta in flow(ticket, turn):
        if delta is None:
            continue
        for part in delta.parts:
            found.add(part)
        found.logprobs += delta.logprobs
        found.routing += delta.routing
        found.thought += delta.thought
        found.reason, found.tokens, found.stop = delta.reason, delta.tokens, delta.stop
    return found
