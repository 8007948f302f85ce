"""One sample of a data set, in the form that the tokenizer and the chat template need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Message = dict[str, Any]


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
