"""Counts what became of the lines of a data set: read, used, blank, cut, refused and why.

A command reads its data sets through a `Tally`; what it counted is part of the command's report, so
that nothing is left out unsaid. Light: report modules import this.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlxfun.text import counted


@dataclass(frozen=True, slots=True)
class DataUse:
    """What became of one source of text.

    read: lines or records found, blank ones included. used: samples that went to the model.
    blank: lines without any text. cut: used samples that were longer than the limit and were cut.
    left: usable lines that were not drawn (--max-samples, weights, held out). refused: {reason:
    lines}. notes: {remark about lines that were used: lines}.
    """

    source: str
    read: int
    used: int
    blank: int = 0
    cut: int = 0
    left: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One sentence.

        >>> DataUse("a.jsonl", 5, 3, blank=1, refused={"with an image part": 1}).summary()
        'a.jsonl: 5 lines read, 3 used, 1 blank, 0 cut, 1 refused (1 with an image part)'
        """
        text = f"{self.source}: {counted(self.read, 'line', 'lines')} read, {self.used:,} used, {self.blank:,} blank"
        text += f", {self.cut:,} cut, {sum(self.refused.values()):,} refused"
        if self.refused:
            text += f" ({_listed(self.refused)})"
        if self.left:
            text += f", {self.left:,} not drawn"
        return text + (f"; {_listed(self.notes)}" if self.notes else "")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


@dataclass(slots=True)
class Part:
    """The running counts of one source. See `DataUse`."""

    source: str
    read: int = 0
    used: int = 0
    blank: int = 0
    cut: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def snapshot(self) -> DataUse:
        """The counts at this moment."""
        return DataUse(
            self.source, self.read, self.used, self.blank, self.cut, self.left,
            dict(self.refused), dict(self.notes),
        )  # fmt: skip


class Tally:
    """Counts per source of one or more data sets."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def part(self, source: str) -> Part:
        """The counts of `source`, begun where there are none."""
        return self._parts.setdefault(source, Part(source))

    def short_of(self, wanted: int | None, found: int) -> None:
        """Note that fewer samples than --max-samples are there, if so."""
        first = next(iter(self._parts.values()), None)
        if wanted is not None and found < wanted and first is not None:
            first.notes[f"fewer than --max-samples {wanted}"] = wanted - found

    def uses(self) -> tuple[DataUse, ...]:
        """What was counted, a source each, in the order in which they were read."""
        return tuple(part.snapshot() for part in self._parts.values())
