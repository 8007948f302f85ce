"""Which panels a terminal of a given size shows. Pure: size and wishes in, names out."""

from __future__ import annotations

from dataclasses import dataclass

PANELS = ("experts", "chat", "plan", "history", "log")

WIDE_COLUMNS, WIDE_ROWS = 110, 30
SPLIT_ROWS = 22


@dataclass(frozen=True, slots=True)
class Arrangement:
    """mode: "wide" (all panels), "split" (experts above one other) or "single" (one panel).

    visible: the panels on screen. tabs: the panels that the tab strip lists, empty for no strip.
    """

    mode: str
    visible: tuple[str, ...]
    tabs: tuple[str, ...]


def arrange(width: int, height: int, panel: str, beside: str, zoomed: bool) -> Arrangement:
    """The arrangement for `width` x `height` cells.

    panel: the focused panel. beside: the last panel focused that is not the heatmap, which shares
    the screen with it. zoomed: the focused panel wants the screen to itself.
    """
    if zoomed:
        return Arrangement("single", (panel,), PANELS)
    if width >= WIDE_COLUMNS and height >= WIDE_ROWS:
        return Arrangement("wide", PANELS, ())
    if height >= SPLIT_ROWS:
        return Arrangement("split", ("experts", beside), PANELS[1:])
    return Arrangement("single", (panel,), PANELS)
