"""Lays out a guide's Markdown as plain text of a given width.

Understood is what the guides use: headings, paragraphs, bullet and numbered lists, fenced code,
tables, pictures (left out), comments (left out), links, bold text. Headings begin at the left
margin, everything below them is indented, code most.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

INDENT = "  "
CODE = INDENT + "    "
GAP = 2  # columns between two columns of a table
NARROWEST = 0.55  # of its widest cell: what a table's column may be cut down to
SOLID = "\xa0"  # a blank that lines are not broken at

_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)]*)\)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_OPTION = re.compile(r"(?<= )(--[a-z-]+) (?=[^-])")  # and its value belong together
_CELLS = re.compile(r"(?<!\\)\|")


def plain(markdown: str, width: int) -> str:
    """`markdown` as plain text, at most `width` columns wide where words are not longer."""
    shown = (_laid_out(block, width) for block in _blocks(_COMMENT.sub("", markdown)))
    return "\n\n".join(text for text in shown if text)


def _blocks(text: str) -> Iterator[list[str]]:
    """Headings, paragraphs, lists, tables and fenced code, each as its lines."""
    block: list[str] = []
    fenced = False
    for line in text.splitlines():
        fence = line.startswith("```")
        if fenced or fence:
            if fence and not fenced and block:
                yield block
                block = []
            block.append(line)
            if fence and fenced:
                yield block
                block = []
            fenced ^= fence
        elif line.strip():
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _laid_out(lines: Sequence[str], width: int) -> str:
    first = lines[0]
    if first.startswith("```"):
        return "\n".join(_code(line, width) for line in lines[1:-1])
    if first.startswith("#"):
        return "\n".join(_broken(_inline(first.lstrip("# ")), width))
    if first.startswith("|"):
        return _table([_cells(line) for line in lines if not set(line) <= set("|-: ")], width)
    if _ITEM.match(first):
        return "\n".join(_wrapped(item, width) for item in _items(lines))
    return _wrapped(" ".join(lines), width)


def _code(line: str, width: int) -> str:
    """A line of code as it stands, or broken between options if it is too long."""
    line = (CODE + line).rstrip()
    if len(line) <= width:
        return line
    margin = line[: len(line) - len(line.lstrip())]
    return "\n".join(_broken(_OPTION.sub(rf"\1{SOLID}", line), width, "", margin + " " * 4))


def _items(lines: Sequence[str]) -> list[str]:
    """The items of a list, each in one line."""
    items: list[str] = []
    for line in lines:
        if _ITEM.match(line):
            items.append(line)
        else:
            items[-1] += " " + line.strip()
    return items


def _wrapped(text: str, width: int, margin: str = INDENT) -> str:
    """One paragraph or list item, its further lines below the first word."""
    text = _inline(text)
    mark = _ITEM.match(text)
    hanging = margin + " " * (mark.end() if mark else 0)
    return "\n".join(_broken(text, width, margin, hanging))


def _inline(text: str) -> str:
    """Text without Markdown's signs, but with those that set off code."""

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if picture:
            return ""
        return f"{words} ({target})" if "://" in target else words.replace(" ", SOLID)

    return _LINK.sub(link, text).replace("**", "").strip()


def _cells(line: str) -> list[str]:
    cells = _CELLS.split(line.strip().removeprefix("|").removesuffix("|"))
    return [_inline(cell.replace("\\|", "|")) for cell in cells]


def _table(rows: list[list[str]], width: int) -> str:
    """Columns where they fit; else a paragraph for each row, its cells below the first one."""
    room = width - len(INDENT) - GAP * (len(rows[0]) - 1)
    widths = _column_widths(rows, room)
    if widths is not None:
        return "\n".join(line for row in rows for line in _row(row, widths))
    head, *body = rows
    first = _record(head, head if len(head) == 2 else head[:1], width)
    return "\n\n".join([first, *(_record(head, row, width) for row in body)])


def _column_widths(rows: list[list[str]], room: int) -> list[int] | None:
    """A width for each column, together at most `room`; None if cells would be broken too often.

    Headings are broken before cells, and of those the ones of the widest column.
    """
    columns = list(zip(*rows, strict=True))
    wanted = [max(map(len, column)) for column in columns]
    whole = [max(*map(len, head.split()), *map(len, body)) for head, *body in columns]
    widths = list(whole)
    while sum(widths) > room:
        widest = widths.index(max(widths))
        widths[widest] -= 1
        if widths[widest] < NARROWEST * whole[widest]:
            return None
    for number, most in enumerate(wanted):
        widths[number] += max(0, min(most - widths[number], room - sum(widths)))
    return widths


def _row(row: list[str], widths: list[int]) -> Iterator[str]:
    cells = [_broken(cell, size) or [""] for cell, size in zip(row, widths, strict=True)]
    for parts in zip_longest(*cells, fillvalue=""):
        padded = (part.ljust(size) for part, size in zip(parts, widths, strict=True))
        yield (INDENT + (" " * GAP).join(padded)).rstrip()


def _record(head: list[str], row: list[str], width: int) -> str:
    lines = [_wrapped(row[0], width)]
    for name, cell in zip(head[1:], row[1:], strict=False):
        if cell:
            said = cell if len(head) == 2 else f"{name}: {cell}"
            lines.append(_wrapped(said, width, CODE))
    return "\n".join(lines)


def _broken(text: str, width: int, first: str = "", further: str = "") -> list[str]:
    """`text` as lines of `width` columns; words, options and names of guides stay whole."""
    lines = wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(SOLID, " ") for line in lines]
