"""Colours of the heatmap, and look-up tables from cell codes to terminal segments.

The ramp runs in one cool hue from near the background to near its opposite, so that lightness
alone carries the heat: it reads the same with any colour vision, and in monochrome. Warm colours
are for marks: red for experts to be pruned, green for forced on, magenta for forced off, yellow
for the experts of the newest token.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from commands.output.gradient import ON_DARK, ON_LIGHT, RGB, blend
from tui.heat.grid import BASE
from tui.heat.model import (
    ABSENT,
    APART,
    CONDEMNED,
    CURSOR,
    DOWN,
    HEAT,
    LEVELS,
    LIT,
    LOADED,
    PROTECTED,
    PRUNED,
    RAMPED,
    SHARE,
    STEPS,
    UNSEEN,
    UP,
)


@dataclass(frozen=True, slots=True)
class HeatColours:
    """The heatmap's colours in one theme.

    ramp: from cold to hot. condemned: the same for experts to be pruned. more, less: from no
    difference to the greatest, orange and blue, which all colour vision tells apart.
    """

    ramp: tuple[RGB, ...]
    condemned: tuple[RGB, ...]
    more: tuple[RGB, ...]
    less: tuple[RGB, ...]
    ground: RGB
    pruned: RGB
    unseen: RGB
    faint: RGB
    red: RGB
    green: RGB
    magenta: RGB
    gold: RGB
    lit: RGB
    loaded: RGB
    cursor: RGB


DARK = HeatColours(
    ramp=ON_DARK,
    condemned=((48, 22, 28), (96, 40, 50), (150, 66, 74), (190, 110, 112)),
    more=((26, 28, 36), (110, 66, 20), (214, 130, 30), (255, 208, 120)),
    less=((26, 28, 36), (24, 70, 130), (40, 130, 220), (150, 206, 255)),
    ground=(15, 18, 28),
    pruned=(38, 36, 40),
    unseen=(58, 50, 40),
    faint=(88, 92, 108),
    red=(255, 96, 96),
    green=(96, 230, 130),
    magenta=(240, 120, 230),
    gold=(240, 200, 90),
    lit=(255, 224, 64),
    loaded=(120, 255, 214),
    cursor=(255, 150, 40),
)  # fmt: skip
LIGHT = HeatColours(
    ramp=ON_LIGHT,
    condemned=((250, 226, 224), (240, 190, 188), (222, 140, 140), (190, 90, 96)),
    more=((236, 238, 242), (250, 206, 150), (226, 136, 40), (140, 66, 0)),
    less=((236, 238, 242), (160, 204, 246), (50, 124, 210), (8, 50, 120)),
    ground=(244, 246, 248),
    pruned=(214, 214, 216),
    unseen=(238, 228, 206),
    faint=(140, 146, 158),
    red=(176, 16, 32),
    green=(0, 120, 50),
    magenta=(160, 20, 150),
    gold=(150, 104, 0),
    lit=(255, 170, 0),
    loaded=(0, 128, 104),
    cursor=(220, 90, 0),
)  # fmt: skip


def ramp_colour(inks: HeatColours, kind: int, level: int) -> RGB:
    """The background of a cell of this kind and level."""
    x = level / (LEVELS - 1)
    if kind == CONDEMNED:
        return blend(inks.condemned, x)
    if kind == SHARE:
        return blend((inks.condemned[0], inks.condemned[1], inks.red), x)
    if kind == APART:
        step, more = divmod(level, 2)
        return blend(inks.more if more else inks.less, step / (STEPS - 1))
    if kind in RAMPED:
        return blend(inks.ramp, x)
    if kind == ABSENT:
        # Its heat still shows, nearer to the background.
        return blend((inks.ground, blend(inks.ramp, x)), 0.35)
    plain = {PRUNED: inks.pruned, UNSEEN: inks.unseen, LIT: inks.lit, CURSOR: inks.cursor,
             LOADED: inks.loaded}  # fmt: skip
    return plain.get(kind, inks.ground)


def half_colour(inks: HeatColours, code: int) -> RGB:
    """The colour of half a character cell, which has no room for a sign."""
    kind, level = divmod(code, LEVELS)
    plain = {UP: inks.green, DOWN: inks.magenta}
    if kind == PROTECTED:
        # Half gold, half heat: marked, and still as light as its heat.
        return blend((inks.gold, blend(inks.ramp, level / (LEVELS - 1))), 0.5)
    if kind == CONDEMNED:
        # No room for hatching: the colour alone must tell it from a cold cell.
        return blend(inks.condemned, 0.5 + 0.5 * level / (LEVELS - 1))
    return plain.get(kind) or ramp_colour(inks, kind, level)


def luma(colour: RGB) -> float:
    """Perceived lightness, 0..255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


ALL_GO = SHARE * LEVELS + LEVELS - 1
"""The code of a cell whose experts are all to be pruned."""


def _style(fore: RGB, back: RGB, *, bold: bool = False) -> Style:
    return Style(color=Color.from_rgb(*fore), bgcolor=Color.from_rgb(*back), bold=bold)


def sign(kind: int) -> str:
    """One character for a kind of expert, readable without colour; a space for an unmarked one."""
    return "╱" if kind in (CONDEMNED, SHARE) else _SIGNS.get(kind, " ")


def expert_colour(inks: HeatColours, kind: int) -> RGB:
    """The colour of a kind of expert where a bar's length shows its heat."""
    named = {CONDEMNED: inks.red, UP: inks.green, DOWN: inks.magenta, PROTECTED: inks.gold,
             LIT: inks.lit, UNSEEN: inks.faint, PRUNED: inks.faint, ABSENT: inks.faint,
             LOADED: inks.loaded}  # fmt: skip
    return named.get(kind) or blend(inks.ramp, 0.55)


class HalfBlocks(dict[int, Segment]):
    """Segments for pairs of codes, cached."""

    def __init__(self, inks: HeatColours, width: int) -> None:
        super().__init__()
        self.inks, self.width = inks, width

    def __missing__(self, pair: int) -> Segment:
        upper, lower = divmod(pair, BASE)
        kinds = (upper // LEVELS, lower // LEVELS)
        back = half_colour(self.inks, lower)
        fore = half_colour(self.inks, upper)
        if kinds == (CONDEMNED, CONDEMNED) or (upper == lower == ALL_GO):
            # Both go: hatched, so that it shows without colour too.
            back, fore, glyph = fore, self.inks.ground, "▚"
        elif kinds == (PROTECTED, PROTECTED):
            fore, glyph = self.inks.ground, "◆"
        elif kinds == (UNSEEN, UNSEEN):
            fore, glyph = self.inks.faint, ":"
        else:
            glyph = "▀"
        segment = self[pair] = Segment(glyph * self.width, _style(fore, back))
        return segment


class Blocks(dict[int, Segment]):
    """Segments for cells of at least one line, cached.

    marked: this line carries the sign of the cell (▲ forced in, ▼ forced out, ◆ protected).
    """

    def __init__(self, inks: HeatColours, width: int, *, marked: bool) -> None:
        super().__init__()
        self.inks, self.width, self.marked = inks, width, marked

    def __missing__(self, code: int) -> Segment:
        kind, level = divmod(code, LEVELS)
        inks = self.inks
        back = ramp_colour(inks, kind, level)
        width = self.width
        text = " " * width
        fore = inks.faint
        if kind == CONDEMNED:
            fore, text = inks.red, ("╱" * width)
        elif kind == SHARE:
            # Readable without colour: less than half, half or more, all.
            sign = "╱" if code == ALL_GO else "/" if 2 * level >= LEVELS - 1 else "'"
            fore, text = inks.faint, sign * width
        elif self.marked and kind in _SIGNS:
            fore, back = _sign_colours(inks, kind, back)
            text = _SIGNS[kind].center(width)
        segment = self[code] = Segment(text, _style(fore, back, bold=kind in RAMPED))
        return segment


_SIGNS = {UP: "▲", DOWN: "▼", PROTECTED: "◆", UNSEEN: "·", PRUNED: "×", ABSENT: "-", LOADED: "↓"}


def _sign_colours(inks: HeatColours, kind: int, back: RGB) -> tuple[RGB, RGB]:
    """Colours of sign and background; the sign's line of a steered cell has the steering's colour."""
    if kind in (UP, DOWN):
        own = inks.green if kind == UP else inks.magenta
        return ((0, 0, 0) if luma(own) > 127 else (255, 255, 255)), own
    ink = inks.gold if kind == PROTECTED else inks.faint
    # On cells of the same lightness a sign would drown.
    if kind == PROTECTED and abs(luma(ink) - luma(back)) < 60:
        ink = (0, 0, 0) if luma(back) > 127 else (255, 255, 255)
    return ink, back


MEANING = {
    UNSEEN: "never seen",
    CONDEMNED: "to prune",
    SHARE: "to prune",
    UP: "force on",
    DOWN: "force off",
    PROTECTED: "protected",
    PRUNED: "pruned",
    LIT: "routed now",
    ABSENT: "on disk",
    LOADED: "just read",
}
"""What the marks of cells mean, in the order in which the legend names them."""


def mark_legend(inks: HeatColours, kinds: frozenset[int]) -> list[tuple[Segment, str]]:
    """A sample and a word for each kind of cell that is in use and has a mark of its own."""
    out: list[tuple[Segment, str]] = []
    for kind, word in MEANING.items():
        if kind in kinds and word not in [known for _, known in out]:
            back = half_colour(inks, kind * LEVELS + LEVELS - 1)
            fore = (0, 0, 0) if luma(back) > 127 else (255, 255, 255)
            out.append((Segment(sign(kind), _style(fore, back)), word))
    return out


def apart_legend(inks: HeatColours, steps: int = 8) -> list[Segment]:
    """The legend of differences: from more in B to more in A, in `steps` columns."""
    half = steps // 2
    places = [(k, 0) for k in range(half, 0, -1)] + [(k, 1) for k in range(1, half + 1)]
    levels = [2 * round(k * (STEPS - 1) / half) + side for k, side in places]
    return [Segment(" ", _style(inks.faint, ramp_colour(inks, APART, level))) for level in levels]


def legend(inks: HeatColours, steps: int = 8) -> list[Segment]:
    """The legend of heat: from cold to hot, in `steps` columns."""
    return [
        Segment(" ", _style(inks.faint, ramp_colour(inks, HEAT, round(k * (LEVELS - 1) /
                                                                      (steps - 1)))))
        for k in range(steps)
    ]  # fmt: skip
