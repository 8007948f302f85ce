"""Which panels a terminal of a given size shows. Pure: size and state in, panel names out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from tui.keys.keymap import PanelName

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
