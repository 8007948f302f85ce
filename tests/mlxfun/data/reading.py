"""Writes and reads small data sets, and a tokenizer of one token a byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxfun.data.datasets import Line, read_lines, tokenize
from mlxfun.data.options import DatasetOptions
from mlxfun.tally import DataUse, Tally

ASK = {"role": "user", "content": "What is two and two?"}
SAY = {"role": "assistant", "content": "Four of them."}
CALLED = {"type": "function", "function": {"name": "get", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


class Spoken:
    """A tokenizer of one token a byte that records what the template was given."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, template: str | None = "{{ messages }} {{ tools }}") -> None:
        self.has_chat_template = template is not None
        self.chat_template = template
        self.given: list[dict[str, Any]] = []

    def encode(self, text: str, **_: Any) -> list[int]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return start + list(text.encode())

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        self.given.append(options)
        return list("".join(f"<{m['role']}>{m['content']}" for m in messages).encode())


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path | str, **options: Any) -> tuple[list[Line], DataUse]:
    tally = Tally()
    lines = read_lines(DatasetOptions(str(path), **options), tally)
    return lines, tally.uses()[0]


def one(tmp_path: Path, record: Any) -> Line:
    (line,), _ = read(write(tmp_path / "one.jsonl", record))
    return line


def use_of(lines: list[Line], tokenizer: Any, max_tokens: int = 512) -> DataUse:
    tally = Tally()
    tokenize(lines, tokenizer, max_tokens, tally=tally)
    return tally.uses()[0]
