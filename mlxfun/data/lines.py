"""One sample of a data set, in the form that the tokenizer and the chat template need."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxfun.errors import DatasetError

Message = dict[str, Any]


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
    completion) pair, the completion "" when the line has none; "text" a string.
    where: "file:line", or the file alone for a whole source file. tools: functions that the
    conversation may call, as the chat template takes them. source: the data set it belongs to.
    form: how the record was written, for people ("text", "messages", "ShareGPT", ...). notes:
    what was left out of it.
    """

    kind: Literal["messages", "prompt", "text"]
    payload: tuple[Message, ...] | tuple[str, str] | str
    where: str
    tools: tuple[Message, ...] = ()
    source: str = ""
    form: str = ""
    notes: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message] | None:
        """The conversation of a chat line, None for plain text."""
        if isinstance(self.payload, str):
            return None
        if self.kind == "messages":
            return [dict(m) for m in self.payload if isinstance(m, dict)]
        prompt, completion = self.payload
        turns: list[Message] = [{"role": "user", "content": prompt}]
        if completion:
            turns.append({"role": "assistant", "content": completion})
        return turns

    def of(self, source: str) -> Line:
        """The same line as one of `source`."""
        return replace(self, source=source)
