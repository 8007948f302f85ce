"""Counts what became of the lines of a data set: read, used, blank, cut, refused and why.

A command reads its data sets through a `Tally`; what it counted is part of the command's report, so
that nothing is left out unsaid. Light: report modules import this.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlxfun.text import counted

FIRST = 3
"""Lines that are named for each reason why some were refused."""

REASONS = 8
"""Reasons that a sentence names."""


@dataclass(frozen=True, slots=True)
class DataUse:
    """What became of one source of text.

    read: lines or records found, blank ones included. used: samples that went to the model.
    blank: lines without any text. cut: used samples that were longer than the limit and were cut.
    left: usable lines that were not drawn (--max-samples, weights, held out). refused: {reason:
    lines}; where: {reason: the first of them}. notes: {remark about lines that were used: lines}.
    """

    source: str
    read: int
    used: int
    blank: int = 0
    cut: int = 0
    left: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def summary(self) -> str:
        """One sentence.

        >>> DataUse("a.jsonl", 5, 3, blank=1, refused={"with an image part": 1}).summary()
        'a.jsonl: 5 lines read, 3 used, 1 blank, 0 cut, 1 refused (1 with an image part)'
        >>> use = DataUse("a", 9, 7, refused={"not valid JSON": 2}, where={"not valid JSON": ("3", "8")})
        >>> use.summary()
        'a: 9 lines read, 7 used, 0 blank, 0 cut, 2 refused (2 not valid JSON: 3, 8)'
        """
        text = f"{self.source}: {counted(self.read, 'line', 'lines')} read, {self.used:,} used, {self.blank:,} blank"
        text += f", {self.cut:,} cut, {sum(self.refused.values()):,} refused"
        if self.refused:
            text += f" ({_listed(self.refused, self.where)})"
        if self.left:
            text += f", {self.left:,} not drawn"
        return text + (f"; {_listed(self.notes)}" if self.notes else "")


def _listed(counts: dict[str, int], where: dict[str, tuple[str, ...]] | None = None) -> str:
    found = []
    for reason, count in list(counts.items())[:REASONS]:
        first = (where or {}).get(reason, ())
        at = f": {', '.join(first)}{', ...' if count > len(first) else ''}" if first else ""
        found.append(f"{count:,} {reason}{at}")
    if rest := list(counts.values())[REASONS:]:
        found.append(f"{sum(rest):,} for {len(rest)} other reasons")
    return "; ".join(found) if where else ", ".join(found)


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
    where: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, reason: str, where: str) -> None:
        """Count a line that is left out; where: "file:line" or the like."""
        self.refused[reason] += 1
        first = self.where.setdefault(reason, [])
        if len(first) < FIRST:
            inside = where.removeprefix(self.source)
            # The number alone in the file that the source is; the file's name in others.
            name = inside.lstrip(":/") if inside != where else where.rpartition("/")[2]
            first.append(name or where.rpartition("/")[2])

    def snapshot(self) -> DataUse:
        """The counts at this moment."""
        return DataUse(
            self.source, self.read, self.used, self.blank, self.cut, self.left,
            dict(self.refused), dict(self.notes),
            {reason: tuple(first) for reason, first in self.where.items()},
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
