"""The conversation as data: questions, growing answers, tokens and the experts that served them.

Pure: each function takes the turns so far and gives the turns that follow.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from commands.words import split as posix_words
from mlxfun.events import JobEnded, Side, Token
from mlxfun.generation.reports import ABReport, ChatReport

if TYPE_CHECKING:
    from mlxfun.arrays import Array

# Options of chat and ab that take no value: what follows them is an option again, or the text.
FLAGS = ("--new", "--base", "--candidate", "--thinking", "--no-thinking")
LIMIT = 200
TRACED = 20
"""How many of the newest answers keep the experts of their tokens: they are megabytes each."""


class Piece(NamedTuple):
    """One token: its text, and the experts int32 [L, K] of the forward that consumed it."""

    text: str
    experts: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One question and its answer. side: which model answered, None before it does; note: why the answer is incomplete; waits: for which
    command it waits, "" once it runs.

    tokens and began (the clock at the first token) give the speed. pieces: the tokens, as long as
    they are kept. both: base and candidate were asked, and answer in turn; other, other_pieces: the
    candidate's answer and its tokens, comparison: how they differ. kept: the model's conversation holds it. instead_of: the turns it replaces,
    which come back if it fails.
    """

    job: int
    prompt: str
    text: str = ""
    side: Side | None = None
    done: bool = False
    note: str = ""
    waits: str = ""
    tokens: int = 0
    began: float = 0.0
    pieces: tuple[Piece, ...] = ()
    both: bool = False
    other: str = ""
    other_pieces: tuple[Piece, ...] = ()
    comparison: ABReport | None = None
    kept: bool = False
    instead_of: tuple[Turn, ...] = ()

    @property
    def every_piece(self) -> tuple[Piece, ...]:
        """The tokens of both sides, the candidate's behind the other's."""
        return self.pieces + self.other_pieces

    def place_of(self, index: int) -> tuple[Side, int]:
        """The side and the token on it of a place in `every_piece`."""
        own = len(self.pieces)
        side: Side = "candidate" if index >= own else "base"
        return side, index - own if index >= own else index


Turns = tuple[Turn, ...]


class Asked(NamedTuple):
    """A parsed chat or ab line. text: None without one; back: how many turns it removes first."""

    command: str
    text: str | None
    back: int
    new: bool


def split(line: str) -> list[str]:
    """`line` in words, as a shell would; on white space when its quotes do not match."""
    try:
        return posix_words(line)
    except ValueError:
        return line.split()


def quoted(text: str) -> str:
    """`text` quoted as the last words of a chat line."""
    # A text that looks like an option must not become one.
    guard = "-- " if text.startswith("-") else ""
    return guard + shlex.quote(text)


def loads(line: str) -> bool:
    """Whether a command line loads a model; load alone lists them.

    >>> loads("load demo --drop"), loads("load"), loads("")
    (True, False, False)
    """
    first, *more = line.split(None, 1) or [""]
    return first == "load" and bool(more)


def asked_of(line: str) -> Asked | None:
    """Parse a chat or ab line; None for any other command."""
    words = split(line)
    if not words or words[0] not in ("chat", "ab"):
        return None
    place, back, new = 1, 0, False
    while place < len(words) and words[place].startswith("-"):
        word = words[place]
        if word == "--":
            place += 1
            break
        new = new or word == "--new"
        name, equals, value = word.partition("=")
        if name == "--back":
            value = value if equals else " ".join(words[place + 1 : place + 2])
            back = int(value) if value.isdigit() else 0
        place += 1 if equals or word in FLAGS else 2
    return Asked(words[0], " ".join(words[place:]) or None, back, new)


def begins_anew(line: str) -> bool:
    """Whether `line` only starts a new conversation."""
    asked = asked_of(line)
    return asked is not None and asked.new and asked.text is None


def find(turns: Turns, job: int) -> Turn | None:
    """The turn of a job, None without one."""
    return next((turn for turn in reversed(turns) if turn.job == job), None)


def add_question(turns: Turns, job: int, line: str) -> Turns:
    """Add the question of a chat or ab line, unless it is there already."""
    asked = asked_of(line)
    if asked is None or find(turns, job) is not None:
        return turns
    taken = tuple(turn for turn in turns if turn.kept)[-asked.back :] if asked.back else ()
    text = asked.text or (taken[0].prompt if taken else None)
    if text is None:
        return turns
    rest = tuple(turn for turn in turns if turn not in taken)
    turn = Turn(job, text, both=asked.command == "ab", instead_of=taken)
    return _traced((*rest, turn)[-LIMIT:])


def waiting(turns: Turns, job: int, line: str) -> Turns:
    """The question of a job waits for `line` to end, or for nothing any more if that is ""."""
    turn = find(turns, job)
    words = f"waits until {line} has ended" if line else ""
    return (
        turns if turn is None or turn.waits == words else _with(turns, replace(turn, waits=words))
    )


def _traced(turns: Turns) -> Turns:
    """Drop the tokens of all but the newest answers."""
    old = turns[:-TRACED]
    bare = (replace(t, pieces=(), other_pieces=()) if t.every_piece else t for t in old)
    return (*bare, *turns[-TRACED:])


def add_token(turns: Turns, event: Token, now: float) -> Turns:
    """Add a token to the answer of its job."""
    turn = find(turns, event.job)
    if turn is None:
        return turns
    turn = replace(turn, tokens=turn.tokens + 1, began=turn.began if turn.tokens else now)
    piece = Piece(event.text, event.experts)
    if turn.both and event.side == "candidate":
        more = (*turn.other_pieces, piece)
        return _with(turns, replace(turn, other=turn.other + event.text, other_pieces=more))
    pieces = (*turn.pieces, piece)
    return _with(turns, replace(turn, text=turn.text + event.text, side=event.side, pieces=pieces))


def _with(turns: Turns, turn: Turn) -> Turns:
    return tuple(turn if old.job == turn.job else old for old in turns)


# Why an answer is incomplete, by its finish reason.
_ENDINGS = {
    "stop": "",
    "length": "cut off at --max-tokens",
    "cancelled": "stopped: not part of the conversation",
}


def _cancelled(report: ChatReport) -> bool:
    return report.finish_reason == "cancelled"


def finish(turns: Turns, event: JobEnded) -> Turns:
    """After a job: finish its turn with the report's text, or the reason why there is none."""
    turn = find(turns, event.job)
    if event.error is None:
        asked = asked_of(event.line)
        cancelled = isinstance(event.report, ChatReport) and _cancelled(event.report)
        anew = asked is not None and asked.new and not cancelled
        if loads(event.line) or anew:
            turns = tuple(t if t.job == event.job else replace(t, kept=False) for t in turns)
    if turn is None:
        return turns
    report = event.report
    if isinstance(report, ChatReport):
        note = _ENDINGS.get(report.finish_reason, report.finish_reason)
        turn = replace(turn, prompt=report.prompt, text=report.text, side=report.side, note=note)
        if not _cancelled(report):
            turn = replace(turn, kept=True, instead_of=())
    elif isinstance(report, ABReport):
        turn = replace(turn, text=report.base.text, other=report.candidate.text, comparison=report)
    elif event.error is not None:
        turn = replace(turn, note="stopped" if event.cancelled else event.error)
    back = turn.instead_of
    turn = replace(turn, done=True, instead_of=())
    if not back:
        return _with(turns, turn)
    rest = tuple(t for t in turns if t.job != turn.job)
    return (*rest, *back, turn)


def served(turn: Turn, position: int, expert: int) -> tuple[int, int]:
    """(tokens of an answer that one expert served, tokens whose experts are known)."""
    known = [piece.experts for piece in turn.every_piece if piece.experts is not None]
    return sum(bool((experts[position] == expert).any()) for experts in known), len(known)
