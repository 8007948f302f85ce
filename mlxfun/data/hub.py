"""Streams a Hugging Face data set into a JSONL file, filtered, line by line.

Nothing but the lines that are kept is held or stored. The `datasets` package is an optional extra;
it is imported when the first record is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxfun.context import SILENT, Context
from mlxfun.data.options import PrepareOptions
from mlxfun.data.reports import PrepareReport
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import Kind, require_writable, writing

Record = Mapping[str, Any]
Stream = Callable[[PrepareOptions], Iterable[Record]]

CHECK_EVERY = 50
"""Records between two looks at whether the job was cancelled."""


def _is_jsonl(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return isinstance(json.loads(file.readline()), dict)
        except (ValueError, RecursionError):
            return False


JSONL = Kind("JSONL data set", _is_jsonl)


def hub_stream(options: PrepareOptions) -> Iterable[Record]:
    """The records of a split, as the Hub sends them.

    Raises DatasetError without the optional package, or when the Hub refuses.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            "prepare-dataset needs the datasets package: pip install 'mlxfun[dataset]'"
        ) from error
    try:
        stream: Iterable[Record] = load_dataset(
            options.source,
            options.subset,
            split=options.split,
            revision=options.revision,
            streaming=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"cannot open the data set {options.source}: {error}") from error
    return stream


def prepare(
    options: PrepareOptions, ctx: Context = SILENT, stream: Stream = hub_stream
) -> PrepareReport:
    """Write the records that pass the filters as JSONL, whole or not at all.

    Raises UsageError for impossible numbers, DatasetError when nothing passes or a column is
    missing, SaveError when the file cannot be written, Cancelled between records.
    """
    _check(options)
    require_writable(options.output, JSONL)
    seen, written = 0, 0
    with writing(options.output, JSONL) as file:
        for record in _records(options, stream):
            if seen % CHECK_EVERY == 0:
                ctx.check()
                ctx.progress("preparing", written, options.max_samples, "samples")
            seen += 1
            line = _line(record, options)
            if line is None:
                continue
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            written += 1
            if written == options.max_samples:
                break
        if not written:
            raise DatasetError(
                f"none of the {seen} records of {options.source} passed the filters; loosen them"
            )
    return PrepareReport(options.source, options.split, str(options.output), seen, written)


def _check(options: PrepareOptions) -> None:
    for name, value in (
        ("--max-samples", options.max_samples),
        ("--min-chars", options.min_chars),
        ("--max-chars", options.max_chars),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if options.max_chars is not None and options.max_chars < (options.min_chars or 1):
        raise UsageError(
            f"--max-chars {options.max_chars} is below --min-chars {options.min_chars}"
        )


def _records(options: PrepareOptions, stream: Stream) -> Iterator[Record]:
    """The stream, with what the Hub raises on the way as a sentence of ours."""
    records = iter(stream(options))
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"reading {options.source} failed: {error}") from error
        yield record


def _line(record: Record, options: PrepareOptions) -> dict[str, Any] | None:
    """The record in a form that mlxfun.data.datasets reads, None when a filter drops it."""
    for column, wanted in options.where:
        if str(_column(record, column, options)) != wanted:
            return None
    if "messages" in record and options.text_column is None:
        line: dict[str, Any] = {"messages": record["messages"]}
        length = sum(len(str(m.get("content", ""))) for m in record["messages"])
    elif "prompt" in record and "completion" in record and options.text_column is None:
        line = {"prompt": record["prompt"], "completion": record["completion"]}
        length = len(str(record["prompt"])) + len(str(record["completion"]))
    else:
        text = _column(record, options.text_column or "text", options)
        if not isinstance(text, str) or not text.strip():
            return None
        line, length = {"content": text}, len(text)
    short = options.min_chars is not None and length < options.min_chars
    long = options.max_chars is not None and length > options.max_chars
    return None if short or long else line


def _column(record: Record, name: str, options: PrepareOptions) -> Any:
    if name not in record:
        raise DatasetError(
            f"{options.source} has no column {name!r} (columns: {', '.join(record)}); choose one "
            "with --text-column"
        )
    return record[name]
