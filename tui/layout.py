"""Which panels a terminal shows, and how large. Pure: size and state in, names and cells out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from tui.keys.keymap import PanelName
from tui.state.sizes import Sizes, bounded

if TYPE_CHECKING:
    from tui.state.app_state import AppState

PANELS: tuple[PanelName, ...] = get_args(PanelName)
# These share a place where all others have one of their own.
UPPER: tuple[PanelName, ...] = ("plan", "mixer", "serve")

WIDE_COLUMNS, WIDE_ROWS = 110, 30
SPLIT_ROWS = 22


Mode = Literal["wide", "split", "single"]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which panels are shown.

    mode: "wide" (all panels), "split" (experts above one other) or "single" (one panel).

    visible: the panels on screen. tabs: the panels that the tab strip lists, empty for no strip.
    """

    mode: Mode
    visible: tuple[PanelName, ...]
    tabs: tuple[PanelName, ...]


def arrange(width: int, height: int, state: AppState) -> Arrangement:
    """The arrangement for `width` x `height` cells.

    Of `state` it reads panel, beside, front, upper and zoomed, and whether anything is served: the
    panel of the server is there only then.
    """
    panels = PANELS if state.view.serving else tuple(p for p in PANELS if p != "serve")
    if state.zoomed:
        return Arrangement("single", (state.panel,), panels)
    if width >= WIDE_COLUMNS and height >= WIDE_ROWS:
        hidden = {name for name in UPPER if name != state.upper}
        return Arrangement("wide", tuple(p for p in panels if p not in hidden), ())
    if height >= SPLIT_ROWS:
        return Arrangement("split", ("experts", state.beside), panels[1:])
    return Arrangement("single", (state.front,), panels)


LEAST_ROWS = 4
"""Lines of a panel with its frame, below which it shows nothing."""
QUIET_CHAT = 7
"""Lines of the chat while nothing has been said."""
RIGHT: tuple[PanelName, ...] = ("plan", "mixer", "serve", "history", "log")
"""The panels of the right column, from the top."""
WEIGHTS: dict[PanelName, float] = {"plan": 5, "mixer": 5, "serve": 5, "history": 2, "log": 4}
"""How the right column is shared where the contents do not fit."""
IN_FRONT = 2.0
"""By how much the panel with the newest outcome counts for more."""

Edge = Literal["left", "right", "top", "bottom"]
"""A side of a panel's frame."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in cells. columns, rows: of all panels together. left: columns of the left column.

    upper: lines of the experts, where something is below them. right: (panel, lines) from the top.
    """

    columns: int
    rows: int
    left: int
    upper: int
    right: tuple[tuple[PanelName, int], ...]


def geometry(
    plan: Arrangement, state: AppState, size: tuple[int, int], wanted: Mapping[PanelName, int]
) -> Geometry:
    """The sizes of the panels in a space of `size` (columns, rows).

    wanted: the lines that each panel of the right column needs for its contents, frame included.
    """
    columns, rows = size
    sizes = state.sizes
    if plan.mode == "split":
        share = sizes.split or (0.5 if "chat" in plan.visible else 0.6)
        return Geometry(columns, rows, columns, max(3, round(rows * bounded(share))), ())
    upper = sizes.upper
    if upper is None:
        upper = (rows - QUIET_CHAT) / max(1, rows) if not state.turns else 0.6
    inside = max(LEAST_ROWS, min(round(rows * upper), rows - LEAST_ROWS))
    names = [name for name in RIGHT if name in plan.visible]
    if sizes.rows is not None and len(names) == len(sizes.rows):
        whole = sum(sizes.rows)
        shares = [max(LEAST_ROWS, round(rows * share / whole)) for share in sizes.rows]
        shares[-1] += rows - sum(shares)
    else:
        weights = [WEIGHTS[n] * (IN_FRONT if n == state.beside else 1) for n in names]
        shares = fitted(rows, [max(LEAST_ROWS, wanted.get(n, rows)) for n in names], weights)
    left = round(columns * bounded(sizes.left))
    return Geometry(columns, rows, left, inside, tuple(zip(names, shares, strict=True)))


def fitted(total: int, wants: Sequence[int], weights: Sequence[float]) -> list[int]:
    """`total` lines for panels that want so many each: all they want where there is room, and the
    last takes what is over; else those that want more than their share by weight get that.

    >>> fitted(30, [5, 5, 8], [5, 2, 4]), fitted(30, [60, 5, 40], [5, 2, 4])
    ([5, 5, 20], [13, 5, 12])
    """
    rows, left, waiting = list(wants), total, set(range(len(wants)))
    while waiting:
        whole = sum(weights[n] for n in waiting)
        small = {n for n in waiting if wants[n] <= left * weights[n] / whole}
        if not small:
            for n in waiting:
                rows[n] = int(left * weights[n] / whole)
            break
        left -= sum(wants[n] for n in small)
        waiting -= small
    last = max(waiting, default=len(wants) - 1)
    if rows:
        rows[last] += total - sum(rows)
    return rows


def moved(sizes: Sizes, now: Geometry, panel: PanelName, edge: Edge, to: tuple[int, int]) -> Sizes:
    """The sizes after a side of a panel was moved to (column, row); the same if it cannot move."""
    column, row = to
    names = [name for name, _ in now.right]
    on_left = panel in ("experts", "chat")
    if edge in ("left", "right"):
        inner = edge == ("right" if on_left else "left") and bool(names)
        return replace(sizes, left=bounded(column / max(1, now.columns))) if inner else sizes
    if on_left:
        if edge != ("bottom" if panel == "experts" else "top"):
            return sizes
        share = bounded(row / max(1, now.rows))
        return replace(sizes, upper=share) if names else replace(sizes, split=share)
    above = names.index(panel) - (edge == "top")
    if not 0 <= above < len(names) - 1:
        return sizes
    lines = [count for _, count in now.right]
    both, start = lines[above] + lines[above + 1], sum(lines[:above])
    lines[above] = max(LEAST_ROWS, min(row - start, both - LEAST_ROWS))
    lines[above + 1] = both - lines[above]
    return replace(sizes, rows=tuple(count / max(1, now.rows) for count in lines))


def stretched(sizes: Sizes, now: Geometry, panel: PanelName, wider: int, taller: int) -> Sizes:
    """The sizes with `panel` so many columns wider and lines taller."""
    on_left, names = panel in ("experts", "chat"), [name for name, _ in now.right]
    if wider and names:
        column = now.left + (wider if on_left else -wider)
        sizes = moved(sizes, now, panel, "right" if on_left else "left", (column, 0))
    if taller and (on_left or not names):
        first = panel == "experts" or (not names and not on_left)
        row = now.upper + (taller if panel == "experts" else -taller)
        return moved(
            sizes, now, "experts" if first else panel, "bottom" if first else "top", (0, row)
        )
    if taller and panel in names:
        place = names.index(panel)
        last = place == len(names) - 1
        start = sum(count for _, count in now.right[:place])
        row = start - taller if last else start + now.right[place][1] + taller
        sizes = moved(sizes, now, panel, "top" if last else "bottom", (0, row))
    return sizes
