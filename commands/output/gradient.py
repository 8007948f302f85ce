"""Colours between evenly spaced anchors, for heat maps in files and on the screen."""

from __future__ import annotations

RGB = tuple[int, int, int]
"""Red, green and blue, 0..255 each."""


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
