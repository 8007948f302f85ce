"""Data sets: lines of text or chat, tokenised and padded into batches.

`read_lines` is the one reader of every command: files, directories and mixtures of them, in the
forms that `mlxfun.data.records` knows. Nothing here depends on the weights; the tokenizer is
mlx-lm's TokenizerWrapper. What became of every line is counted in a `Tally`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlxfun.context import running
from mlxfun.data import sources
from mlxfun.data.chat import Tokenizer, Tokens, chat_ids, prompt_tokens, remarks, text_ids
from mlxfun.data.conversations import Unusable
from mlxfun.data.lines import BrokenLines, Line, Message
from mlxfun.data.options import DatasetOptions
from mlxfun.data.records import parse
from mlxfun.data.rendered import as_rendered, rendered_ids
from mlxfun.errors import DatasetError, UsageError
from mlxfun.tally import Tally

__all__ = ["Batch", "Line", "Message", "Tokenizer", "Tokens", "batches", "prompt_tokens",
           "read_lines", "require_known", "tokenize"]  # fmt: skip

SHORT = "shorter than two tokens"


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: int32 [B, T], right-padded with 0; mask: bool [B, T], True on real tokens.

    rows: for each batch row the index of its sequence.
    """

    tokens: Tokens
    mask: NDArray[np.bool_]
    rows: tuple[int, ...]


def read_lines(options: DatasetOptions, tally: Tally | None = None) -> list[Line]:
    """Read the whole data set, then subsample `max_samples` of it in the original order.

    Blank lines, lines that cannot be used and a few broken ones (see mlxfun.data.lines) are left
    out, and counted, before that. Sources with weights are cut, each to an even subsample, until
    they stand in that proportion.

    Raises DatasetError naming file and line, UsageError for impossible numbers.
    """
    tally = tally if tally is not None else Tally()
    if options.max_samples is not None and options.max_samples < 1:
        raise UsageError(f"--max-samples {options.max_samples} must be at least 1")
    parts = [_read_source(source, options.text_key, tally) for source, _ in options.parts]
    rng = np.random.default_rng(options.seed)
    lines = _weighed(parts, [weight for _, weight in options.parts], rng)
    found = len(lines)
    if options.max_samples is not None and options.max_samples < found:
        chosen = np.sort(rng.choice(found, options.max_samples, replace=False))
        lines = [lines[i] for i in chosen]
    tally.short_of(options.max_samples, found)
    kept = {id(line) for line in lines}
    for line in (line for part in parts for line in part):
        tally.part(line.source).left += id(line) not in kept
    return lines


def _read_source(source: str, text_key: str, tally: Tally) -> list[Line]:
    """Every usable line of one source. Raises DatasetError when there is none."""
    path, part = sources.resolve(source), tally.part(source)
    lines: list[Line] = []
    broken = BrokenLines(tally)
    if beside := sources.left_out(path):
        part.read += beside
        part.refused[".json file beside data of other kinds: name it by itself"] += beside
    for file in sources.files(path):
        for found in sources.values(file):
            part.read += 1
            with broken.counted(source):
                try:
                    line = _line(found, text_key, source)
                except Unusable as reason:
                    part.refuse(str(reason), found.where)
                    continue
                if line is None:
                    part.blank += 1
                else:
                    lines.append(line)
    broken.require_few(len(lines) + broken.count)
    if not lines:
        why = "every line of it is blank" if _any_byte(path) else "it is empty"
        if part.refused:
            why = part.snapshot().summary().removeprefix(f"{source}: ")
        raise DatasetError(f"{path} holds no samples: {why}; choose another file")
    return lines


def _any_byte(path: Path) -> bool:
    return any(file.stat().st_size for file in sources.files(path))


def _line(found: sources.Found, text_key: str, source: str) -> Line | None:
    if found.broken is not None:
        raise found.broken
    if found.text is not None:
        if not found.text.strip():
            return None
        return Line("text", found.text, found.where, source=source, form="text file")
    if found.value is None:
        return None
    line = parse(found.value, text_key, found.where)
    return None if line is None else line.of(source)


def _weighed(
    parts: list[list[Line]], weights: list[float | None], rng: np.random.Generator
) -> list[Line]:
    """All lines, or subsamples in the proportion of the weights, where any is given (else 1)."""
    if any(weight is not None for weight in weights):
        shares = [1.0 if weight is None else weight for weight in weights]
        unit = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        counts = [max(1, math.floor(unit * share + 1e-9)) for share in shares]
        chosen = [
            np.sort(rng.choice(len(part), count, replace=False))
            for part, count in zip(parts, counts, strict=True)
        ]
        parts = [[part[i] for i in rows] for part, rows in zip(parts, chosen, strict=True)]
    return [line for part in parts for line in part]


def tokenize(
    lines: list[Line],
    tokenizer: Tokenizer,
    max_tokens: int,
    vocabulary: int | None = None,
    tally: Tally | None = None,
) -> list[Tokens]:
    """Token sequences, int32 [T] each, with T <= max_tokens, in the order of `lines`.

    Chat lines go through the chat template; without a template their contents are joined by
    newlines. Sequences under two tokens predict nothing and are left out, so
    `len(lines) - len(result)` lines were dropped.

    Raises UsageError for max_tokens < 2, DatasetError when nothing is left, when the template
    refuses more than a few, or for a token outside the model's `vocabulary` (None: not checked).
    """
    if max_tokens < 2:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 2")
    tally = tally if tally is not None else Tally()
    sequences = []
    broken = BrokenLines(tally)
    for read in lines:
        running().check()
        line = as_rendered(read, tokenizer)
        with broken.counted(line.source):
            ids = line_ids(line, tokenizer)
            require_known(ids, vocabulary, line.where)
            if len(ids) >= 2:
                count_used(line, tokenizer, len(ids), max_tokens, tally)
                sequences.append(np.asarray(ids[:max_tokens], dtype=np.int32))
            else:
                tally.part(line.source).refuse(SHORT, line.where)
    broken.require_few(len(lines))
    if lines and not sequences:
        raise DatasetError(
            f"all {len(lines)} samples from {lines[0].where} on are shorter than two tokens"
        )
    return sequences


def read_sequences(
    data: DatasetOptions, tokenizer: Tokenizer, vocabulary: int | None, tally: Tally
) -> list[Tokens]:
    """A data set as token sequences, see `read_lines` and `tokenize`."""
    return tokenize(read_lines(data, tally), tokenizer, data.max_tokens, vocabulary, tally)


def line_ids(line: Line, tokenizer: Tokenizer) -> list[int]:
    """The ids of a whole line, uncut. Raises BrokenLine when the template refuses it."""
    if line.kind == "rendered":
        return rendered_ids(line.text, tokenizer)
    if (messages := line.messages) is None:
        return text_ids(line.text, tokenizer)
    return chat_ids(messages, tokenizer, line.where, line.tools, add_generation_prompt=False)


def count_used(
    line: Line, tokenizer: Tokenizer, length: int, max_tokens: int, tally: Tally
) -> None:
    """Count a line of `length` tokens that goes to the model, and what is left out of it."""
    part = tally.part(line.source)
    part.used += 1
    part.cut += length > max_tokens
    notes = [*line.notes]
    if (messages := line.messages) is not None:
        notes += remarks(messages, line.tools, tokenizer)
    part.notes.update(notes)


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
