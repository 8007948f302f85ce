"""Data sets: lines of text or chat, tokenised and padded into batches.

Lines of a JSONL file take one of three forms, detected line by line: a conversation (`messages`),
a prompt with its completion, or plain text under a key. A directory is one text per source file.
Nothing here depends on the weights; the tokenizer is mlx-lm's TokenizerWrapper.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mlxfun.data import demo
from mlxfun.data.options import DatasetOptions
from mlxfun.data.templates import bounded
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import DATA_BYTES, read_file

TEXT_SUFFIXES = (".sol", ".txt", ".py", ".md")
DEFAULT_TEXT_KEY = "content"
QUOTED = 200
"""How much of what somebody else's code says is quoted."""

Tokens = NDArray[np.int32]
Message = dict[str, Any]


class Tokenizer(Protocol):
    """What the engine needs of mlx-lm's TokenizerWrapper."""

    has_chat_template: bool

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def detokenizer(self) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...

    def decode(self, tokens: Sequence[int], **options: Any) -> str: ...

    def apply_chat_template(self, messages: list[Message], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Line:
    """One sample.

    payload by kind: "messages" a tuple of {"role", "content", ...}; "prompt" a (prompt,
    completion) pair, the completion "" when the line has none; "text" a string.
    where: "file:line", or the file alone for a whole source file.
    """

    kind: Literal["messages", "prompt", "text"]
    payload: tuple[Message, ...] | tuple[str, str] | str
    where: str

    @property
    def messages(self) -> list[Message] | None:
        """The conversation of a chat line, None for plain text."""
        if isinstance(self.payload, str):
            return None
        if self.kind == "messages":
            return [dict(m) for m in self.payload if isinstance(m, dict)]
        prompt, completion = self.payload
        turns = [{"role": "user", "content": prompt}]
        if completion:
            turns.append({"role": "assistant", "content": completion})
        return turns


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: int32 [B, T], right-padded with 0; mask: bool [B, T], True on real tokens.

    rows: for each batch row the index of its sequence.
    """

    tokens: Tokens
    mask: NDArray[np.bool_]
    rows: tuple[int, ...]


def read_lines(options: DatasetOptions) -> list[Line]:
    """Read the whole source, then subsample `max_samples` of it in the original order.

    Raises DatasetError naming file and line, UsageError for impossible numbers.
    """
    if options.max_samples is not None and options.max_samples < 1:
        raise UsageError(f"--max-samples {options.max_samples} must be at least 1")
    path = _resolve(options.source)
    lines: list[Line] = []
    for file in _files(path):
        if file.suffix in TEXT_SUFFIXES:
            text = _decode(_read(file), str(file))
            if text.strip():
                lines.append(Line("text", text, str(file)))
        else:
            lines.extend(_read_jsonl(file, options.text_key))
    if not lines:
        raise DatasetError(
            f"{path} holds no samples: every line of it is blank; choose another file"
        )
    if options.max_samples is None or options.max_samples >= len(lines):
        return lines
    rng = np.random.default_rng(options.seed)
    chosen = np.sort(rng.choice(len(lines), options.max_samples, replace=False))
    return [lines[i] for i in chosen]


def _resolve(source: str) -> Path:
    if source.startswith("demo:"):
        return demo.dataset_path(source.removeprefix("demo:"))
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):  # path.exists() raises for a name that is too long
        sets = ", ".join(f"demo:{name}" for name in demo.DATASETS)
        raise DatasetError(f"no such file or directory: {source}; bundled sample sets are {sets}")
    return path


def _files(path: Path) -> list[Path]:
    """The files to read, a directory's sorted by relative name; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    wanted = (*TEXT_SUFFIXES, ".jsonl")
    found = sorted(
        (file.relative_to(path) for file in path.rglob("*") if file.suffix in wanted),
        key=lambda relative: relative.as_posix(),
    )
    visible = [path / f for f in found if not any(part.startswith(".") for part in f.parts)]
    files = [file for file in visible if file.is_file()]
    if not files:
        raise DatasetError(
            f"{path} has no {', '.join(wanted)} files to read; choose another directory"
        )
    return files


def _read(file: Path) -> bytes:
    try:
        return read_file(file, DATA_BYTES)
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}; check the path") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); "
            "convert it to UTF-8"
        ) from error


def _read_jsonl(file: Path, text_key: str) -> list[Line]:
    # Bytes are split on \n alone: str.splitlines would also cut at U+2028 inside a JSON string.
    raw = _read(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = []
    for number, data in enumerate(raw, 1):
        if not data.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(_decode(data, where))
        except json.JSONDecodeError as error:
            raise DatasetError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); "
                "a data set holds one JSON object a line"
            ) from error
        except RecursionError as error:
            raise DatasetError(f"{where}: nested too deeply to be a sample") from error
        except ValueError as error:
            raise DatasetError(f"{where}: a number of thousands of digits is no sample") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{where}: expected a JSON object, found {_kind(record)}")
        lines.append(_parse(record, text_key, where))
    return lines


def _parse(record: dict[str, Any], text_key: str, where: str) -> Line:
    """Recognise one record: messages, then prompt and completion, then text under a key."""
    if "messages" in record:
        return Line("messages", _messages(record["messages"], where), where)
    keys = [text_key]
    if text_key == DEFAULT_TEXT_KEY:
        # Nobody asked for a key, so the other common name is as good.
        keys.append("text")
    found = next((key for key in keys if key in record), None)
    if "prompt" in record and ("completion" in record or found is None):
        prompt = _string(record["prompt"], "prompt", where)
        completion = _string(record.get("completion", ""), "completion", where)
        return Line("prompt", (prompt, completion), where)
    if found is not None:
        return Line("text", _string(record[found], found, where), where)
    seen = ", ".join(repr(key) for key in record) or "none"
    raise DatasetError(
        f"{where}: no text under {text_key!r} (keys seen: {seen}); choose one with --text-key"
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: 'messages' must be a non-empty list, found {_kind(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DatasetError(f"{where}: messages[{number}] needs a 'role' and a 'content'")
        if not isinstance(message["content"], list | None):
            # Lists of typed parts and the null of a tool call are for the template to judge.
            _string(message["content"], f"messages[{number}].content", where)
        _string(message["role"], f"messages[{number}].role", where)
    return tuple(value)


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{where}: {key!r} must be a string, found {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half a surrogate pair; no tokenizer accepts that.
        raise DatasetError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}"
        ) from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "null" if value is None else "a number")


def tokenize(
    lines: list[Line], tokenizer: Tokenizer, max_tokens: int, vocabulary: int | None = None
) -> list[Tokens]:
    """Token sequences, int32 [T] each, with T <= max_tokens, in the order of `lines`.

    Chat lines go through the chat template; without a template their contents are joined by
    newlines. Sequences under two tokens predict nothing and are left out, so
    `len(lines) - len(result)` lines were dropped.

    Raises UsageError for max_tokens < 2, DatasetError when nothing is left, when a template
    refuses, or for a token outside the model's `vocabulary` (None: not checked).
    """
    if max_tokens < 2:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 2")
    sequences = []
    for line in lines:
        if (messages := line.messages) is not None:
            ids = _chat_ids(messages, tokenizer, line.where, add_generation_prompt=False)
        else:
            ids = tokenizer.encode(str(line.payload))
        require_known(ids, vocabulary, line.where)
        if len(ids) >= 2:
            sequences.append(np.asarray(ids[:max_tokens], dtype=np.int32))
    if lines and not sequences:
        raise DatasetError(
            f"all {len(lines)} samples from {lines[0].where} on are shorter than two tokens"
        )
    return sequences


def require_known(ids: Sequence[int], vocabulary: int | None, where: str) -> None:
    """Raise DatasetError for a token that the model has no embedding for.

    MLX does not check indices: such a token would read memory that is not the model's.
    """
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise DatasetError(
            f"{where}: the tokenizer gives token {highest}, the model knows 0..{vocabulary - 1}; "
            "the tokenizer files are not this model's, copy them from its source"
        )


def prompt_tokens(
    messages: list[Message], tokenizer: Tokenizer, thinking: bool | None = None
) -> Tokens:
    """int32 [T]: the conversation and the generation prompt that asks the assistant to answer.

    thinking: switch reasoning on or off where the template knows it; None keeps its default.
    Without a template the contents are joined by newlines.
    """
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    ids = _chat_ids(messages, tokenizer, "chat", add_generation_prompt=True, **options)
    return np.asarray(ids, dtype=np.int32)


def _chat_ids(
    messages: list[Message], tokenizer: Tokenizer, where: str, **options: Any
) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode("\n".join(_plain(m["content"]) for m in messages))
    from jinja2 import TemplateError

    try:
        with bounded(where):
            result = tokenizer.apply_chat_template(messages, **options)
    except (
        TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())[:QUOTED] or type(error).__name__
        raise DatasetError(
            f"{where}: the model's chat template refuses this conversation: {said}"
        ) from error
    return _ids(result)


def _plain(content: Any) -> str:
    """The text of a message whose content may be a list of typed parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def _ids(result: Any) -> list[int]:
    """Token ids from whatever shape apply_chat_template returns (it changed between releases)."""
    if hasattr(result, "keys"):
        result = result["input_ids"]
    if hasattr(result, "ids"):
        result = result.ids
    if len(result) == 1 and not isinstance(result[0], int | np.integer):
        result = result[0]
    return [int(token) for token in result]


def batches(sequences: list[Tokens], batch_tokens: int, max_batch: int) -> list[Batch]:
    """Group sequences of like length; rows x longest row stays within `batch_tokens`.

    A sequence longer than `batch_tokens` gets a batch of its own. Batches come in the order of
    their earliest sequence, not of length, so that a cancelled run has seen a fair sample.

    Raises UsageError when a bound is below 1.
    """
    if batch_tokens < 1 or max_batch < 1:
        raise UsageError(f"batches of {batch_tokens} tokens and {max_batch} rows hold nothing")
    groups: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        # Ascending lengths: the newcomer is the longest row of its group.
        rows = len(groups[-1]) + 1 if groups else 0
        if 0 < rows <= max_batch and rows * len(sequences[index]) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_pad(sequences, tuple(rows)) for rows in sorted(groups, key=min)]


def _pad(sequences: list[Tokens], rows: tuple[int, ...]) -> Batch:
    width = max(len(sequences[i]) for i in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    mask = np.zeros((len(rows), width), dtype=np.bool_)
    for row, index in enumerate(rows):
        length = len(sequences[index])
        tokens[row, :length] = sequences[index]
        mask[row, :length] = True
    return Batch(tokens, mask, rows)
