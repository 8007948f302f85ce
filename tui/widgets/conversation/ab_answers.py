"""An A/B turn: both answers side by side, their first difference, the divergence per token."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from mlxfun.generation.reports import ABReport
from tui.state.chat_turns import Turn
from tui.text import harmless
from tui.widgets.lineview import Lines

SIDE_BY_SIDE = 44
"""Columns from which on the answers stand beside each other."""
GAP = 3
STRIP = "▁▂▃▄▅▆▇█"
FULL = 2.0
"""Nats at which the strip is full: the next token is another one then."""
BASE, CANDIDATE, DIM = Style(color="blue"), Style(color="yellow"), Style(dim=True)
PARTED = Style(reverse=True, bold=True)


def level(kl: float) -> int:
    """The height of the strip for `kl` nats, 0..7, by the square root, so that small values show.

    >>> level(0.0), level(0.05), level(0.5), level(9.0)
    (0, 1, 4, 7)
    """
    return min(len(STRIP) - 1, int((max(kl, 0.0) / FULL) ** 0.5 * len(STRIP)))


def both_lines(turn: Turn, width: int, console: Console) -> Lines:
    """Both answers, and when they are complete the strip of KL."""
    report = turn.comparison
    left, right = _texts(turn)
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
        lines += _strip(report, width)
    return lines


def _texts(turn: Turn) -> tuple[Text, Text]:
    report = turn.comparison
    if report is None:
        return Text(harmless(turn.text) or "..."), Text(harmless(turn.other) or "...")
    return (
        _marked(report.base.tokens, report.first_divergence),
        _marked(report.candidate.tokens, report.first_divergence),
    )


def _marked(tokens: tuple[str, ...], parted: int | None) -> Text:
    """The tokens, with the first different one marked; a mark at the end if it is missing."""
    text = Text()
    for index, token in enumerate(tokens):
        text.append(harmless(token), PARTED if index == parted else Style())
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


def _strip(report: ABReport, width: int) -> Lines:
    """The strip, one column per token of the base's answer, and the figures."""
    room = max(8, width - 2)
    lines: Lines = []
    for start in range(0, len(report.kl), room):
        some = report.kl[start : start + room]
        row = [Segment("  ")]
        for kl in some:
            height = level(kl)
            style = Style(color="red" if height >= 6 else "yellow" if height >= 3 else "green")
            row.append(Segment(STRIP[height], style))
        lines.append(row)
        at = report.first_divergence
        if at is not None and start <= at < start + len(some):
            # Below the strip: a reversed bar would look like another height.
            lines.append([Segment("  " + " " * (at - start)), Segment("▲", Style(bold=True))])
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
        f"{where} · KL per token: mean {report.kl_mean:.3f}, max {report.kl[top]:.2f} at token "
        f"{top + 1}"
    )
