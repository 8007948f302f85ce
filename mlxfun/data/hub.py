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
from mlxfun.data.conversations import Unusable
from mlxfun.data.lines import BrokenLine, Line
from mlxfun.data.options import PrepareOptions
from mlxfun.data.records import DEFAULT_TEXT_KEY, FORMS, parse
from mlxfun.data.reports import PrepareReport
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import Kind, require_writable, writing
from mlxfun.tally import Part

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
    part, written = ctx.reading().part(options.source), 0
    with writing(options.output, JSONL) as file:
        for record in _records(options, stream):
            if part.read % CHECK_EVERY == 0:
                ctx.check()
                ctx.progress("preparing", written, options.max_samples, "samples")
            part.read += 1
            line = _line(record, options, part)
            if line is None:
                continue
            file.write((json.dumps(line, ensure_ascii=False, default=str) + "\n").encode())
            written += 1
            part.used += 1
            if written == options.max_samples:
                break
        if not written:
            raise DatasetError(
                f"none of the {part.read} records of {options.source} passed: "
                f"{part.snapshot().summary()}; loosen the filters, or choose another --text-column"
            )
    return PrepareReport(options.source, options.split, str(options.output), part.read, written)


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


def _line(record: Record, options: PrepareOptions, part: Part) -> dict[str, Any] | None:
    """The record as the readers write it, None for one that is left out, which is counted."""
    where = f"{options.source}[{part.read - 1}]"
    for column, wanted in options.where:
        if str(_column(record, column, options)) != wanted:
            part.refused["of another value than --where asks for"] += 1
            return None
    needed = options.text_column
    if needed is not None or not any(key in record for key in (*FORMS, "content", "text")):
        _column(record, needed or "text", options)
    try:
        line = _sample(record, options, where)
    except Unusable as reason:
        part.refuse(str(reason), where)
        return None
    except BrokenLine as error:
        part.refuse(error.reason, where)
        return None
    if line is None:
        part.blank += 1
        return None
    length = _length(line)
    if options.min_chars is not None and length < options.min_chars:
        part.refused[f"shorter than {options.min_chars} characters"] += 1
        return None
    if options.max_chars is not None and length > options.max_chars:
        part.refused[f"longer than {options.max_chars} characters"] += 1
        return None
    part.notes.update(line.notes)
    return _written(line)


def _sample(record: Record, options: PrepareOptions, where: str) -> Line | None:
    column = options.text_column
    if column is None:
        return parse(dict(record), DEFAULT_TEXT_KEY, where)
    return parse({column: record[column]}, column, where)


def _length(line: Line) -> int:
    if isinstance(line.payload, str):
        return len(line.payload)
    return sum(len(str(turn["content"])) for turn in line.messages or ())


def _written(line: Line) -> dict[str, Any]:
    if isinstance(line.payload, str):
        return {"content": line.payload}
    if line.kind == "prompt":
        prompt, completion = line.payload
        return {"prompt": prompt, "completion": completion}
    found: dict[str, Any] = {"messages": line.messages}
    return found | ({"tools": list(line.tools)} if line.tools else {})


def _column(record: Record, name: str, options: PrepareOptions) -> Any:
    if name not in record:
        raise DatasetError(
            f"{options.source} has no column {name!r} (columns: {', '.join(record)}); choose one "
            "with --text-column"
        )
    return record[name]
