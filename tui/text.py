"""Text formatting that several widgets share. Pure."""

from __future__ import annotations

from rich.text import Text

from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.events import Side
from mlxfun.text import readable_bytes, visible

SHOWN_SIDES: dict[Side, str] = {"base": "current", "candidate": "candidate"}
"""What the two sides are called on the screen."""

EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int) -> str:
    """`share` in 0..1 as a bar of exactly `width` columns, in eighths of a column.

    >>> bar(0.5, 4), bar(0.0, 2), bar(1.0, 2), bar(0.3, 3)
    ('██  ', '  ', '██', '▉  ')
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[part] if part else "")).ljust(width)


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(0.4), duration(7), duration(75), duration(3700)
    ('0.4 s', '7 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: float, unit: str) -> str:
    """A figure of progress with its unit; bytes in powers of 1024.

    >>> count(3 * 1024 * 1024, "B"), count(12, "samples"), count(4.25, "batches")
    ('3.0 MiB', '12 samples', '4.2 batches')
    """
    if unit in ("B", "bytes"):
        return readable_bytes(value)
    number = f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
    return f"{number} {unit}".rstrip()


def shortened(text: str, width: int) -> str:
    """`text` on one line, cut with an ellipsis to `width` columns.

    >>> shortened("a long sentence", 7), shortened("short", 7)
    ('a long…', 'short')
    """
    line = Text(" ".join(text.split()))
    line.truncate(max(1, width), overflow="ellipsis")
    return line.plain


def ranges(numbers: list[int]) -> str:
    """Sorted numbers with runs shortened.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7, 8'
    """
    parts: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i < len(numbers) and numbers[i] == numbers[i - 1] + 1:
            continue
        run = numbers[start:i]
        parts.extend([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(n) for n in run])
        start = i
    return ", ".join(parts)


def harmless(text: str) -> str:
    """`text` as `mlxfun.text.visible` gives it, tabs as four blanks.

    >>> harmless("a\\x1b[31mb\\tc")
    'a␛[31mb    c'
    """
    return visible(text.replace("\r\n", "\n").replace("\t", "    "))


def tree(history: HistoryReport) -> list[tuple[str, HistoryNode]]:
    """Every state with the lines of its branches, parents before children."""
    children: dict[int | None, list[HistoryNode]] = {}
    for node in history.nodes:
        children.setdefault(node.parent, []).append(node)
    out: list[tuple[str, HistoryNode]] = []

    # A stack instead of recursion: a long session makes a deep tree.
    stack = [(node, "", "") for node in reversed(children.get(None, []))]
    while stack:
        node, lead, branch = stack.pop()
        out.append((lead + branch, node))
        below = children.get(node.id, [])
        # A child without siblings stays in its parent's column, so a plain series does not march
        # off to the right.
        under = lead + {"": "", "├─": "│ ", "└─": "  "}[branch]
        for index, child in reversed(list(enumerate(below))):
            if len(below) == 1:
                stack.append((child, under, ""))
            else:
                stack.append((child, under, "└─" if index == len(below) - 1 else "├─"))
    return out
