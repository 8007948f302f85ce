"""Colours between evenly spaced anchors, for heat maps in files and on the screen."""

from __future__ import annotations

RGB = tuple[int, int, int]
"""Red, green and blue, 0..255 each."""

ON_DARK: tuple[RGB, ...] = (
    (30, 40, 70), (26, 66, 118), (24, 116, 170), (60, 176, 214), (150, 226, 240), (236, 252, 255),
)  # fmt: skip
"""The ramp of the screen's dark theme, from cold to hot."""
ON_LIGHT: tuple[RGB, ...] = (
    (206, 222, 236), (172, 206, 230), (112, 176, 216), (44, 126, 184), (16, 76, 140), (4, 30, 76),
)  # fmt: skip
"""The ramp of the screen's light theme."""
CIVIDIS: tuple[RGB, ...] = (
    (0, 34, 78), (53, 69, 108), (102, 105, 112), (124, 123, 120), (165, 156, 116), (212, 193, 92),
    (254, 232, 56),
)  # fmt: skip
"""Cividis (Nunez, Anderton and Renslow, 2018), which reads the same with any colour vision, and in
grey."""


def blend(anchors: tuple[RGB, ...], x: float) -> RGB:
    """The colour at `x` in 0..1 between evenly spaced anchors.

    >>> blend(((0, 0, 0), (10, 20, 30)), 0.5)
    (5, 10, 15)
    """
    place = min(max(x, 0.0), 1.0) * (len(anchors) - 1)
    left = min(int(place), len(anchors) - 2)
    part = place - left
    low, high = anchors[left], anchors[left + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue
