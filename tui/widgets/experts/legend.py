"""The legend of the heatmap's colours, in one line."""

from __future__ import annotations

from dataclasses import replace

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

STEPS = 8
WORDS = ("idle ", " busy")
SIDES = ("B more ", " A more")


class Legend(Widget):
    """The ramp from cold to hot."""

    DEFAULT_CSS = """
    Legend { width: 22; height: 1; color: $foreground 60%; display: none; }
    """

    apart = False
    """Whether the map shows differences."""

    def show(self, *, apart: bool) -> None:
        """Show the legend of heat, or of differences."""
        if apart != self.apart:
            self.apart = apart
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """The only line."""
        # Numeric modules load after the first paint; this is hidden until then.
        from tui.heat.paint import DARK, LIGHT, apart_legend, legend

        base = self.rich_style
        ground = self.background_colors[1]
        inks = DARK if self.app.current_theme.dark else LIGHT
        inks = replace(inks, ground=(ground.r, ground.g, ground.b))
        words, draw = (SIDES, apart_legend) if self.apart else (WORDS, legend)
        low, high = (Segment(word, base + Style(dim=True)) for word in words)
        used = sum(map(len, words)) + STEPS
        space = Segment(" " * max(0, self.size.width - used), base)
        return Strip([space, low, *draw(inks, STEPS), high])
