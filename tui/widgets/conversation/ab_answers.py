"""An A/B turn: both answers side by side, their first difference, the divergence per token."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from mlxfun.generation.reports import ABReport
from tui.state.chat_turns import Turn
from tui.text import harmless
from tui.widgets.conversation.traced import Traced
from tui.widgets.lineview import Lines

SIDE_BY_SIDE = 44
"""Columns from which on the answers stand beside each other."""
GAP = 3
STRIP = "▁▂▃▄▅▆▇█"
FULL, LEAST_FULL = 2.0, 1e-3
"""Nats at which the strip is full: the next token is another one then. Below LEAST_FULL nothing
that can be told apart is left."""
BASE, CANDIDATE, DIM = Style(color="blue"), Style(color="yellow"), Style(dim=True)
PARTED = Style(reverse=True, bold=True)


def level(kl: float, full: float = FULL) -> int:
    """The height of the strip for `kl` nats, 0..7, by the square root, so that small values show.

    full: nats of the highest bar.

    >>> level(0.0), level(0.05), level(0.5), level(9.0), level(0.05, full=0.1)
    (0, 1, 4, 7, 5)
    """
    return min(len(STRIP) - 1, int((max(kl, 0.0) / full) ** 0.5 * len(STRIP)))


def full_at(report: ABReport) -> float:
    """Nats of the highest bar: where all values are small, their own largest, so that they differ."""
    return min(FULL, max((*report.kl, LEAST_FULL)))


def both_lines(turn: Turn, width: int, console: Console, traced: Traced | None = None) -> Lines:
    """Both answers, and when they are complete the strip of KL. traced: which tokens are marked."""
    report = turn.comparison
    left, right = _texts(turn, traced)
    heads = ("current", "candidate")
    if report is not None:
        heads = (report.base.label, report.candidate.label)
    if width >= SIDE_BY_SIDE:
        half = (width - GAP) // 2
        lines = _beside(
            _column(heads[0], BASE, left, half, console),
            _column(heads[1], CANDIDATE, right, half, console),
            half,
        )
    else:
        lines = _column(heads[0], BASE, left, width, console)
        lines += _column(heads[1], CANDIDATE, right, width, console)
    if report is not None:
        lines += _strip(report, width, _token_of(turn, traced))
    return lines


def _token_of(turn: Turn, traced: Traced | None) -> int | None:
    """Which token of its side is under the cursor."""
    if traced is None or traced.token is None:
        return None
    return turn.place_of(traced.token)[1]


def _texts(turn: Turn, traced: Traced | None) -> tuple[Text, Text]:
    report = turn.comparison
    if report is None:
        return Text(harmless(turn.text) or "..."), Text(harmless(turn.other) or "...")
    parted, own = report.first_divergence, len(turn.pieces)
    return (
        _marked(report.base.tokens, parted, traced, 0),
        _marked(report.candidate.tokens, parted, traced, own),
    )


def _marked(tokens: tuple[str, ...], parted: int | None, traced: Traced | None, first: int) -> Text:
    """The tokens, with the first different one marked; a mark at the end if it is missing.

    first: the place of the side's first token in all pieces of the turn.
    """
    text = Text()
    for index, token in enumerate(tokens):
        style = traced.style(first + index) if traced is not None else None
        shown = harmless(token)
        if traced is not None and traced.token == first + index:
            shown = shown.replace("\n", "⏎\n")  # a line break under the cursor must show, too
        text.append(shown, style or (PARTED if index == parted else Style()))
    if parted is not None and parted >= len(tokens):
        text.append("∎", PARTED)
    return text


def _column(head: str, style: Style, text: Text, width: int, console: Console) -> Lines:
    inner = max(8, width - 2)
    lines: Lines = [[Segment(f"▎ {head}", style + Style(bold=True))]]
    for line in text.wrap(console, inner, overflow="fold"):
        drawn = [Segment(s.text, s.style or Style()) for s in line.render(console, end="")]
        lines.append([Segment("▎ ", style), *drawn])
    return lines


def _beside(left: Lines, right: Lines, half: int) -> Lines:
    out: Lines = []
    for index in range(max(len(left), len(right))):
        one = left[index] if index < len(left) else [Segment("▎", BASE)]
        other = right[index] if index < len(right) else [Segment("▎", CANDIDATE)]
        used = Segment.get_line_length(one)
        out.append([*one, Segment(" " * (half - used + GAP)), *other])
    return out


def _strip(report: ABReport, width: int, token: int | None) -> Lines:
    """The strip, one column per token of the current model's answer, and the figures.

    token: the one under the cursor.
    """
    room, full = max(8, width - 2), full_at(report)
    lines: Lines = []
    for start in range(0, len(report.kl), room):
        some = report.kl[start : start + room]
        row = [Segment("  ")]
        for kl in some:
            # The colour says how much it is, the height what differs within this answer.
            size = level(kl)
            style = Style(color="red" if size >= 6 else "yellow" if size >= 3 else "green")
            row.append(Segment(STRIP[level(kl, full)], style))
        lines.append(row)
        # Below the strip: a reversed bar would look like another height.
        marks = {report.first_divergence: "▲", token: "┃"}
        below = [marks.get(at, " ") for at in range(start, start + len(some))]
        if any(mark != " " for mark in below):
            lines.append([Segment("  "), Segment("".join(below).rstrip(), Style(bold=True))])
    lines.append([Segment(f"  {figures(report)}"[:width], DIM)])
    return lines


def figures(report: ABReport) -> str:
    """The comparison in one line."""
    parted = report.first_divergence
    where = "same answer" if parted is None else f"diverge at token {parted + 1}"
    if not report.kl:
        return where
    top = max(range(len(report.kl)), key=report.kl.__getitem__)
    return (
        f"{where} · KL per token: mean {report.kl_mean:.3g}, max {report.kl[top]:.3g} at token "
        f"{top + 1}"
    )
