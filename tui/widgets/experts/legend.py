"""The legend of the heatmap: every colour and mark that is in use, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    from tui.heat.model import HeatModel

STEPS, LEAST_STEPS = 8, 4
"""Colours of the ramp, where there is room and where there is not."""


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
        draw, strip = apart_legend if apart else legend, Strip([])
        # Where it is narrow the marks keep their words; the panel's title names the scale, too.
        for steps, said, gap in ((STEPS, f" high ({scale})", "  "), (STEPS, " high", "  "),
                                 (LEAST_STEPS, " high", " ")):  # fmt: skip
            words = ("B more ", " A more") if apart else ("low ", said)
            segments = [Segment(words[0], base), *draw(inks, steps), Segment(words[1], base)]
            for mark, word in mark_legend(inks, kinds):
                segments += [Segment(gap, base), mark, Segment(f" {word}", base)]
            strip = Strip(segments)
            if strip.cell_length <= self.size.width:
                break
        return strip.crop_extend(0, self.size.width, base)
