"""What the heatmap's colours mean, in one short line."""

from __future__ import annotations

from dataclasses import replace

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

STEPS = 8
WORDS = ("idle ", " busy")


class Legend(Widget):
    """The ramp from cold to hot."""

    DEFAULT_CSS = """
    Legend { width: 18; height: 1; color: $foreground 60%; display: none; }
    """

    def render_line(self, y: int) -> Strip:
        """The only line."""
        # Numeric modules load after the first paint; this is hidden until then.
        from tui.heat.paint import DARK, LIGHT, legend

        base = self.rich_style
        ground = self.background_colors[1]
        inks = DARK if self.app.current_theme.dark else LIGHT
        inks = replace(inks, ground=(ground.r, ground.g, ground.b))
        low, high = (Segment(word, base + Style(dim=True)) for word in WORDS)
        strip = Strip([low, *legend(inks, STEPS), high])
        return strip.adjust_cell_length(self.size.width, base)
