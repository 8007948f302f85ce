"""The layer widget: one line per expert of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.keys.keymap import bindings
from tui.messages import ExpertClicked
from tui.text import bar, shortened

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from tui.heat.layer import LayerModel

HEAD = 2
"""Lines that stay while the experts scroll under them: the summary and the titles."""
LEAST_BAR, WIDEST_BAR = 6, 40
TOPIC = 26
"""Columns of the topics, where an expert of the layer has one."""
TOPICS_FROM = 60
"""Width of the panel from which on there is room for them."""
COLUMNS = (
    # title, columns, from which width of the panel on it is shown
    ("share", 7, 0),
    ("cumulative", 12, 44),
    ("chosen", 10, 56),
    ("weight", 8, 66),
    ("score", 10, 76),
)


class LayerView(ScrollView, can_focus=True, inherit_bindings=False):
    """Draws a LayerModel, a line per expert."""

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("experts")]

    DEFAULT_CSS = """
    LayerView { height: 1fr; scrollbar-size-vertical: 1; scrollbar-gutter: stable;
                overflow-x: hidden; background: $background; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._model: LayerModel | None = None
        self._marked: Array | None = None
        self._expert = 0

    def show(self, model: LayerModel, expert: int, marked: Array | None) -> None:
        """Draw `model`. expert: under the cursor; marked: bool [E], the range, if any is."""
        moved = self._model is None or self._expert != expert or self._model.layer != model.layer
        self._model, self._expert, self._marked = model, expert, marked
        self.virtual_size = Size(self.size.width, HEAD + len(model.rows))
        self.refresh()
        if moved:
            self._reveal()

    def on_resize(self, _: events.Resize) -> None:
        self._reveal()

    def _reveal(self) -> None:
        """Scroll so that the expert under the cursor is on screen."""
        if self._model is None or not self.size.height:
            return
        line = self._model.rows.tolist().index(self._expert)
        room, y = max(1, self.size.height - HEAD), self.scroll_offset.y
        if not y <= line < y + room:
            self.scroll_to(y=line if line < y else line - room + 1, animate=False)

    # Drawing ----------------------------------------------------------------------------------
    def render_line(self, y: int) -> Strip:
        """One line of the window."""
        base, width = self.rich_style, self.scrollable_content_region.width
        model = self._model
        if model is None:
            return Strip.blank(width, base)
        if y == 0:
            said = shortened(model.summary, width)
            return Strip([Segment(said, base + Style(bold=True))]).adjust_cell_length(width, base)
        if y == 1:
            titles = [Segment(self._titles(model, width), base + Style(dim=True))]
            return Strip(titles).adjust_cell_length(width, base)
        line = y - HEAD + self.scroll_offset.y
        if line >= len(model.rows):
            return Strip.blank(width, base)
        return self._line(model, int(model.rows[line]), width, base)

    def _titles(self, model: LayerModel, width: int) -> str:
        titles = "".join(title.rjust(room) for title, room in _shown(model, width))
        titles += "  serves" if _topics(model, width) else ""
        return " " * (_gutter(model) + _bar(model, width)) + titles

    def _line(self, model: LayerModel, expert: int, width: int, base: Style) -> Strip:
        # The numeric modules load after the first paint.
        from tui.heat.paint import DARK, LIGHT, expert_colour, sign

        inks = DARK if self.app.current_theme.dark else LIGHT
        kind = int(model.kinds[expert])
        here = expert == self._expert and self.has_focus
        marked = self._marked is not None and bool(self._marked[expert])
        name = base + Style(bold=here, reverse=here)
        ink = base + Style(color=Color.from_rgb(*expert_colour(inks, kind)))
        digits = len(str(len(model.rows) - 1)) + 1
        pointer = "▸" if expert == self._expert else "┃" if marked else " "
        room = _bar(model, width)
        segments = [
            Segment(pointer, base + Style(bold=True)),
            Segment(f"E{expert}".rjust(digits), name),
            Segment(f" {sign(kind)} ", ink + Style(bold=True)),
            Segment(self._bar_of(model, expert, room - 1) + " ", ink),
        ]
        cells = "".join(
            model.cell(title, expert).rjust(room) for title, room in _shown(model, width)
        )
        segments.append(Segment(cells, base))
        if _topics(model, width):
            topic = shortened(model.topics[expert], TOPIC - 2)
            segments.append(Segment(f"  {topic}", base + Style(italic=True)))
        return Strip(segments).adjust_cell_length(width, base)

    @staticmethod
    def _bar_of(model: LayerModel, expert: int, width: int) -> str:
        values = model.values
        if values is None:
            return " " * width
        size = abs(values)
        top = float(size.max(initial=0.0))
        return bar(float(size[expert]) / top if top > 0 else 0.0, width)

    # Mouse ------------------------------------------------------------------------------------
    def on_click(self, event: events.Click) -> None:
        line = event.y - HEAD + self.scroll_offset.y
        if self._model is not None and event.y >= HEAD and line < len(self._model.rows):
            self.post_message(ExpertClicked(int(self._model.rows[line])))


def _gutter(model: LayerModel) -> int:
    """Columns of the pointer, the expert's name and its sign."""
    return len(str(len(model.rows) - 1)) + 5


def _shown(model: LayerModel, width: int) -> list[tuple[str, int]]:
    """The columns that have figures and fit: (title, width)."""
    known = {
        "share": model.shares is not None,
        "cumulative": model.below is not None,
        "chosen": model.chosen is not None,
        "weight": model.weight is not None,
        "score": model.values is not None,
    }
    width -= _topics(model, width)
    return [(title, room) for title, room, least in COLUMNS if known[title] and width >= least]


def _topics(model: LayerModel, width: int) -> int:
    """Columns of the topics, 0 for none."""
    return TOPIC if model.topics and width >= TOPICS_FROM else 0


def _bar(model: LayerModel, width: int) -> int:
    """The width of the bar: what the figures and the topics leave."""
    left = width - _gutter(model) - sum(room for _, room in _shown(model, width))
    left -= _topics(model, width)
    return max(LEAST_BAR, min(WIDEST_BAR, left))
