"""How the panels share the screen: three presets, and what the user made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

Preset = Literal["balanced", "map", "text"]
"""Layouts to choose from: all alike, a large map, or much room for the chat and reports."""

LEAST, MOST = 0.15, 0.85
"""Bounds of a share of the screen."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shares of the screen.

    left: of the width, for the experts and the chat. upper: of that column's height, for the
    experts; None as the chat needs it. split: the same where only two panels are shown, None for
    more if the other one is not the chat. rows: of
    the right column's height, for its three panels from the top; None as their contents need it.
    """

    preset: Preset = "balanced"
    left: float = 0.6
    upper: float | None = None
    split: float | None = None
    rows: tuple[float, ...] | None = None

    def data(self) -> dict[str, object]:
        """As JSON."""
        return {
            "preset": self.preset,
            "left": self.left,
            "upper": self.upper,
            "split": self.split,
            "rows": list(self.rows) if self.rows is not None else None,
        }


BALANCED = Sizes()
OF_PRESET: dict[Preset, Sizes] = {
    "balanced": BALANCED,
    "map": Sizes("map", 0.74, 0.78, 0.75),
    "text": Sizes("text", 0.5, 0.35, 0.4),
}


def next_preset(sizes: Sizes) -> Sizes:
    """The preset after that of `sizes`, without what the user changed of it."""
    names = get_args(Preset)
    return OF_PRESET[names[(names.index(sizes.preset) + 1) % len(names)]]


def bounded(share: float) -> float:
    """The nearest share that leaves something for both sides."""
    return min(max(share, LEAST), MOST)


def read(found: Mapping[str, object]) -> Sizes:
    """The sizes of a file; the usual ones for what is no share of a screen.

    >>> read({"preset": "map", "left": 9, "upper": 0.5}).left, read({}).preset
    (0.74, 'balanced')
    """
    preset = found.get("preset")
    sizes = next((made for name, made in OF_PRESET.items() if name == preset), BALANCED)
    left, upper, split = (_share(found.get(name)) for name in ("left", "upper", "split"))
    listed = found.get("rows")
    rows = tuple(map(_share, listed)) if isinstance(listed, list) else ()
    known = tuple(share for share in rows if share is not None)
    return replace(
        sizes,
        left=left or sizes.left,
        upper=upper or sizes.upper,
        split=split or sizes.split,
        rows=known if len(known) == len(rows) == 3 else None,
    )


def _share(value: object) -> float | None:
    inside = isinstance(value, int | float) and 0.02 <= value <= 0.98
    return float(value) if inside and isinstance(value, int | float) else None
