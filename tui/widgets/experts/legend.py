"""The legend of the heatmap: every colour and mark that is in use, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    from tui.heat.model import HeatModel

STEPS = 8


class Legend(Widget):
    """The ramp from low to high, then the marks that are on the map."""

    DEFAULT_CSS = """
    Legend { width: 1fr; height: 1; color: $foreground 70%; display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[bool, str, frozenset[int]] = (False, "linear", frozenset())

    def show(self, model: HeatModel) -> None:
        """Show the legend of `model`."""
        from tui.heat.metrics import DIFFERENCE

        shown = (model.metric.startswith(DIFFERENCE), model.scale, model.shown)
        if shown != self._shown:
            self._shown = shown
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """The only line."""
        # Numeric modules load after the first paint; this is hidden until then.
        from tui.heat.paint import DARK, LIGHT, apart_legend, legend, mark_legend

        apart, scale, kinds = self._shown
        base, ground = self.rich_style, self.background_colors[1]
        inks = DARK if self.app.current_theme.dark else LIGHT
        inks = replace(inks, ground=(ground.r, ground.g, ground.b))
        words = ("B more ", " A more") if apart else ("low ", f" high ({scale})")
        draw = apart_legend if apart else legend
        segments = [Segment(words[0], base), *draw(inks, STEPS), Segment(words[1], base)]
        for mark, word in mark_legend(inks, kinds):
            segments += [Segment("  ", base), mark, Segment(f" {word}", base)]
        return Strip(segments).crop_extend(0, self.size.width, base)
