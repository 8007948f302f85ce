"""What a data set holds, and what the model would see of it, without running the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import (
    SHORT,
    Line,
    Tokenizer,
    count_used,
    line_ids,
    read_lines,
    require_known,
)
from mlxfun.data.lines import BrokenLines
from mlxfun.data.options import DatasetOptions
from mlxfun.data.rendered import as_rendered
from mlxfun.data.reports import DatasetReport, Lengths

CHECK_EVERY = 64
SHOWN = 2000
"""Characters of the first sample that are shown."""


def describe(
    options: DatasetOptions,
    tokenizer: Tokenizer | None,
    vocabulary: int | None,
    ctx: Context = SILENT,
) -> DatasetReport:
    """Read a data set and measure its samples: in tokens, or in characters without a tokenizer.

    Raises DatasetError and UsageError as reading and tokenizing do, Cancelled between samples.
    """
    tally = ctx.reading()
    lines = read_lines(options, tally)
    if tokenizer is None:
        lengths = [len(_plain(line)) for line in lines]
        for line in lines:
            tally.part(line.source).used += 1
        first = _plain(lines[0])
    else:
        lengths, first = [], ""
        broken = BrokenLines(tally)
        for number, read in enumerate(lines):
            line = as_rendered(read, tokenizer)
            if number % CHECK_EVERY == 0:
                ctx.check()
                ctx.progress("tokenizing", number, len(lines), "samples")
            with broken.counted(line.source):
                ids = line_ids(line, tokenizer)
                require_known(ids, vocabulary, line.where)
                if len(ids) < 2:
                    tally.part(line.source).refuse(SHORT, line.where)
                    continue
                count_used(line, tokenizer, len(ids), options.max_tokens, tally)
                first = first or tokenizer.decode(ids[: options.max_tokens])
                lengths.append(len(ids))
        broken.require_few(len(lines))
    return DatasetReport(
        source=options.source,
        samples=len(lengths),
        forms=dict(Counter(line.form for line in lines).most_common()),
        unit="characters" if tokenizer is None else "tokens",
        lengths=_lengths(lengths),
        first=first[:SHOWN],
        max_tokens=None if tokenizer is None else options.max_tokens,
    )


def _plain(line: Line) -> str:
    """The text of a line without any template."""
    if isinstance(line.payload, str):
        return line.payload
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in line.messages or ())


def _lengths(values: Sequence[int]) -> Lengths | None:
    if not values:
        return None
    found = np.asarray(values)
    low, middle, high = (int(x) for x in np.percentile(found, (0, 50, 95)))
    return Lengths(low, middle, float(found.mean()), high, int(found.max()), int(found.sum()))
