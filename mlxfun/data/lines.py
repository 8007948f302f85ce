"""One sample of a data set, in the form that the tokenizer and the chat template need.

Broken lines are left out and counted while they are few, and an error when they are many: a run over
night shall not end at the third broken line of 100,000, and a file of another kind, or read under a
wrong key, shall not be taken for a data set of which most happens to be broken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxfun.errors import DatasetError
from mlxfun.tally import Tally

Message = dict[str, Any]

ONE_IN = 10
"""Up to one in so many lines may be broken."""


class BrokenLine(DatasetError):
    """A line that is not what its form demands. where: as of `Line`. reason: what is wrong with it,
    the same for all lines that are broken in this way.
    """

    def __init__(self, where: str, what: str, detail: str = "") -> None:
        """The message is where, what and detail; the reason is what, without numbers of parts."""
        super().__init__(f"{where}{'' if what.startswith('is ') else ':'} {what}{detail}")
        self.where = where
        self.reason = re.sub(r"\[\d+\]", "[]", what).removeprefix("is ")


@dataclass(frozen=True, slots=True)
class Line:
    """One sample.

    payload by kind: "messages" a tuple of {"role", "content", ...}; "prompt" a (prompt,
    completion) pair, the completion "" when the line has none; "rendered" such a pair that the chat
    template has been through (see mlxfun.data.rendered); "text" a string.
    where: "file:line", or the file alone for a whole source file. tools: functions that the
    conversation may call, as the chat template takes them. source: the data set it belongs to.
    form: how the record was written, for people ("text", "messages", "ShareGPT", ...). notes:
    what was left out of it.
    """

    kind: Literal["messages", "prompt", "rendered", "text"]
    payload: tuple[Message, ...] | tuple[str, str] | str
    where: str
    tools: tuple[Message, ...] = ()
    source: str = ""
    form: str = ""
    notes: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message] | None:
        """The conversation of a chat line, None for plain text and for one that is rendered."""
        if isinstance(self.payload, str) or self.kind == "rendered":
            return None
        if self.kind == "messages":
            return [dict(m) for m in self.payload if isinstance(m, dict)]
        prompt, completion = self.payload
        turns: list[Message] = [{"role": "user", "content": prompt}]
        if completion:
            turns.append({"role": "assistant", "content": completion})
        return turns

    @property
    def text(self) -> str:
        """The text of a line that is no list of messages, "" of one that is."""
        if isinstance(self.payload, str):
            return self.payload
        return "".join(map(str, self.payload)) if self.kind != "messages" else ""

    def of(self, source: str) -> Line:
        """The same line as one of `source`."""
        return replace(self, source=source)


class BrokenLines:
    """The broken lines among those that are worked on one after the other."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._first: BrokenLine | None = None
        self.count = 0

    @contextmanager
    def counted(self, source: str) -> Iterator[None]:
        """Work on one line of `source`: a BrokenLine ends the block, and is counted."""
        try:
            yield
        except BrokenLine as error:
            self.count += 1
            self._first = self._first or error
            self._tally.part(source).refuse(error.reason, error.where)

    def require_few(self, tried: int) -> None:
        """Raise DatasetError, naming the first, where more than one in ten of `tried` are broken."""
        if self._first is None or self.count * ONE_IN <= tried:
            return
        if tried == 1:
            raise self._first
        raise DatasetError(
            f"{self._first} ({self.count:,} of {tried:,} lines are broken; up to 1 in {ONE_IN} "
            "are left out and counted)"
        ) from self._first
