"""A report from inside a forward as a grid of cells, each with a line of explanation. Pure.

Cells have a text of a few columns, a strength 0..1 that colours them, and a sign. What Enter does on
a cell is a command line, as is what the keys for another layer or head do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxfun.report import Report
from mlxfun.tracing.reports import AttentionReport, HeadMapsReport, LensReport, PatchReport
from tui.text import harmless, shortened

WORD = 9
"""Columns of a cell that shows a word."""


@dataclass(frozen=True, slots=True)
class Cell:
    """strength: 0..1; negative: whether it pulls the other way; missing: nothing is there."""

    text: str
    strength: float
    negative: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """rows, columns: labels. cell, explain: of (row, column). enter: the command line for a cell, ""
    for none. turned: command lines of another head (dx) or layer (dy), "" where there is none.
    width: columns of a cell. start: where the cursor begins. picture: the strengths [n][n] of a small
    map that stands in a cell, one character wide and half a line high each; None for cells of text.
    """

    title: str
    legend: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cell: Callable[[int, int], Cell]
    explain: Callable[[int, int], str]
    enter: Callable[[int, int], str]
    width: int
    start: tuple[int, int]
    turned: Callable[[int, int], str] = lambda _dx, _dy: ""
    picture: Callable[[int, int], Sequence[Sequence[float]]] | None = None


def grid_of(report: Report) -> Grid | None:
    """The grid of a report, None for one that has none."""
    if isinstance(report, LensReport):
        return _lens(report)
    if isinstance(report, AttentionReport):
        return _attention(report)
    if isinstance(report, HeadMapsReport):
        return _heads(report)
    return _patch(report) if isinstance(report, PatchReport) else None


def shown(word: str, width: int = WORD) -> str:
    """A token in a cell: its spaces seen, cut to the width.

    >>> shown(" the"), shown("straightforward")
    ('·the', 'straight…')
    """
    return shortened(harmless(word.replace(" ", "·").replace("\n", "⏎")), width)


def _text(report: LensReport | AttentionReport | HeadMapsReport) -> str:
    """The words of a command that end in the text which a report is of."""
    return ("--chat " if report.chat else "") + shlex.quote(report.text)


def _lens(report: LensReport) -> Grid:
    layers, last = report.layers[::-1], len(report.layers) - 1

    def cell(row: int, column: int) -> Cell:
        words, chances = report.words[last - row][column], report.probabilities[last - row][column]
        return Cell(shown(words[0]), chances[0])

    def explain(row: int, column: int) -> str:
        words, chances = report.words[last - row][column], report.probabilities[last - row][column]
        said = ", ".join(f"{shown(w, 16)} {p:.0%}" for w, p in zip(words, chances, strict=True))
        ranks = report.answer_ranks[last - row][column] if report.answers else ()
        followed = "".join(
            f"; {shown(a, 16)} is number {rank}"
            for a, rank in zip(report.answers, ranks, strict=True)
        )
        at = f"after {report.positions[column]} {shown(report.tokens[column], 16)}"
        return f"layer {layers[row]}, {at}: {said}{followed}"

    def enter(row: int, column: int) -> str:
        token = report.ids[last - row][column][0]
        text = _text(report)
        return f"attribute --position {report.positions[column]} --answer '#{token}' {text}"

    columns = tuple(shown(token) for token in report.tokens)
    legend = "brighter: more probable; Enter: which parts wrote this word"
    start = 0, len(report.tokens) - 1
    rows = tuple(f"{layer:>3}" for layer in layers)
    title = f"lens: {report.summary()}"
    return Grid(title, legend, rows, columns, cell, explain, enter, WORD, start)


def _attention(report: AttentionReport) -> Grid:
    labels = tuple(f"{i:>3} {shown(t)}" for i, t in enumerate(report.tokens))

    def cell(row: int, column: int) -> Cell:
        weight = report.weights[row][column]
        text = (
            f"{weight:.0%}".removesuffix("%") if weight >= 0.005 else "·" if column <= row else ""
        )
        return Cell(text, weight, missing=column > row)

    def explain(row: int, column: int) -> str:
        looks = ", ".join(
            f"{i} {shown(report.tokens[i], 16)} {report.weights[row][i]:.0%}"
            for i in report.looks[row]
        )
        pair = f"{row} {shown(report.tokens[row], 16)} attends to {column}"
        here = f"{pair} {shown(report.tokens[column], 16)} with {report.weights[row][column]:.1%}"
        return f"{here}; most to {looks}"

    def turned(heads: int, layers: int) -> str:
        head, layer = report.head + heads, report.layer + layers
        if not 0 <= head < report.heads or layer < 0:
            return ""
        return f"attention --layer {layer} --head {head} {_text(report)}"

    def enter(_row: int, _column: int) -> str:
        return f"attention --layer {report.layer} --all-heads {_text(report)}"

    legend = "rows attend to columns; + and - another head, < and > another layer; Enter: all heads"
    last = len(report.tokens) - 1
    columns = tuple(str(i) for i in range(len(report.tokens)))
    return Grid(report.summary(), legend, labels, columns, cell, explain, enter, 4, (last, 0),
                turned)  # fmt: skip


ACROSS = 5
"""Small maps side by side."""


def _heads(report: HeadMapsReport) -> Grid:
    count = len(report.rows)

    def head_at(row: int, column: int) -> int:
        return row * ACROSS + column

    def cell(row: int, column: int) -> Cell:
        head = head_at(row, column)
        return Cell(f"head {head}" if head < count else "", 0.0, missing=head >= count)

    def picture(row: int, column: int) -> Sequence[Sequence[float]]:
        head = head_at(row, column)
        return report.maps[head] if head < count else ()

    def explain(row: int, column: int) -> str:
        head = head_at(row, column)
        if head >= count:
            return ""
        first, before, own, tokens = report.rows[head]
        return (
            f"head {head}: {first:.0%} on the first token, {before:.0%} on the one before, "
            f"{own:.0%} on itself; attends to {tokens:.1f} tokens"
        )

    def enter(row: int, column: int) -> str:
        head = head_at(row, column)
        if head >= count:
            return ""
        return f"attention --layer {report.layer} --head {head} {_text(report)}"

    def turned(_heads: int, layers: int) -> str:
        layer = report.layer + layers
        if not layers or layer < 0:
            return ""
        return f"attention --layer {layer} --all-heads {_text(report)}"

    legend = "queries down, keys across; Enter: this head; < and > another layer"
    rows = tuple("" for _ in range(-(-count // ACROSS)))
    columns = tuple("" for _ in range(min(ACROSS, count)))
    width = len(report.maps[0])
    return Grid(report.summary(), legend, rows, columns, cell, explain, enter, max(width, 8), (0, 0),
                turned, picture)  # fmt: skip


def _patch(report: PatchReport) -> Grid:
    layers, last = report.layers[::-1], len(report.layers) - 1
    sizes = [abs(x) for row in report.scores for x in row if x is not None]
    most = max(sizes, default=0.0) or 1.0

    def score(row: int, column: int) -> float | None:
        return report.scores[last - row][column]

    def cell(row: int, column: int) -> Cell:
        x = score(row, column)
        if x is None:
            return Cell("", 0.0, missing=True)
        text = f"{x * 100:+.0f}" if abs(x) >= 0.005 else "·"
        return Cell(text, abs(x) / most, negative=x < 0)

    def explain(row: int, column: int) -> str:
        x = score(row, column)
        place = f"layer {layers[row]}, {report.across} {report.labels[column]!r}"
        if x is None:
            return f"{place}: there is none"
        return f"{place}: {x:+.1%} of the way from the corrupted to the clean run"

    def enter(row: int, column: int) -> str:
        if report.component != "expert":
            return ""
        return f"why {layers[row]}:{report.labels[column]}"

    by_word = report.across == "position"
    columns = tuple(shown(label, 6) if by_word else label for label in report.labels)
    legend = "percent of the metric restored, negative ones underlined"
    return Grid(report.summary(), legend, tuple(f"{n:>3}" for n in layers), columns, cell, explain,
                enter, 6, (0, len(report.labels) - 1))  # fmt: skip
