"""The experts panel: heatmap or table, and a line about the expert under the cursor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import ScrollableContainer
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.calibration.options import METRICS
from mlxfun.calibration.reports import DiffReport
from mlxfun.text import no_experts
from tui import hints
from tui.input import chat_actions, expert_selection
from tui.keys.keymap import bindings
from tui.state.app_state import AppState
from tui.state.chat_turns import served
from tui.widgets.experts.heatmap import Heatmap
from tui.widgets.experts.layer import LayerView
from tui.widgets.experts.legend import Legend
from tui.widgets.line import Line
from tui.widgets.panel import Panel

if TYPE_CHECKING:
    from tui.heat.model import HeatModel


def compared(report: DiffReport, metric: str) -> str:
    """The comparison of two files of statistics in one line."""
    name = next(known for known in METRICS if metric == f"A-B {known}")
    a, b = (Path(path).name for path in report.files)
    return (
        f"A {a} - B {b} · share of {name} · rank correlation {report.rank_correlation[name]:.2f} · "
        f"{report.overlap[name]:.0%} of the lowest quarter shared"
    )


class HeatTable(ScrollableContainer, can_focus=True):
    """The heatmap as a table, for use without colours."""

    BINDINGS: ClassVar[list[BindingType]] = [
        b for b in bindings("experts") if b.id in ("table", "metric", "why", "closer", "dossier")
    ]


SHAPES: tuple[tuple[type[Widget], str], ...] = (
    (Heatmap, "map"),
    (HeatTable, "table"),
    (LayerView, "layer"),
)
"""What takes turns in the panel, and the name of each in the state."""


class ExpertsPanel(Panel):
    """Layers by experts: the heatmap, one layer, or a table."""

    panel = "experts"
    title = "experts"
    about = (
        "One cell is one expert of one layer: the brighter, the higher its score by the chosen "
        "metric. Each layer has its own colour scale unless you press {span}; {scale} switches "
        "between a scale chosen from the data, linear, log and rank.\n\n"
        "·  never seen     ╱  to be pruned     ×  pruned\n"
        "▲  forced on      ▼  forced off       ◆  protected\n"
        "yellow: selected at this moment\n\n"
        "After `stats diff A B` the map shows the difference of two statistics files ({metric} "
        "cycles to it): orange has the larger share of its layer in the first, blue in the second. "
        "`stats rank A B "
        "--n-prune 4 --stage` stages the experts that several files rank lowest.\n\n"
        "In a map with more layers than lines, layers share a line and experts a cell. A cell then "
        "shows the fraction of its experts that are pruned; the line below the map names them all, "
        "and {table} shows the map as a table.\n\n"
        "{closer} opens the layer under the cursor, one line per expert, and from there (or at "
        "once with {dossier}) one expert: its scores, its top tokens and the most similar expert; "
        "{escape} returns. 'cumulative' is the share lost if an expert is pruned with all that "
        "score lower. {sort} sorts each layer by score, {zoom} gives the map the whole screen, "
        "{fit} shows every expert in a column of its own. {find} jumps to an expert, such as 12:40; "
        "{next_flagged} and {previous_flagged} step through those that are pruned, steered, "
        "protected or never seen.\n\n"
        "{pick} adds the expert under the cursor to those to prune, or removes it from them. "
        "{range_left}, {range_right}, {range_up} and {range_down} mark a range, {range_column} "
        "this expert number in all layers, {range_row} the layer; {pick} then applies to what is "
        "marked. {pick_more} and {pick_fewer} prune one more or one fewer in every layer by score, "
        "{pick_below} every expert whose share is at most that of the one under the cursor, "
        "{pick_even} evens the layers out. Size and share lost follow at once; when you pause, the "
        "selection becomes a staged plan and is measured quickly."
    )

    SCOPED_CSS = False

    DEFAULT_CSS = """
    ExpertsPanel #empty { height: 1fr; content-align: center middle; text-align: center;
                          color: $foreground 70%; }
    ExpertsPanel #words { height: 1; width: 1fr; text-wrap: nowrap;
                           text-overflow: ellipsis; color: $foreground 85%; }
    ExpertsPanel #caption { height: 1; color: $foreground 60%; display: none; }
    .-single #caption { display: block; }
    ExpertsPanel HeatTable { height: 1fr; overflow: auto auto; scrollbar-size-horizontal: 1; background: $background; scrollbar-size-vertical: 1; }
    ExpertsPanel HeatTable Static { width: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._worded: tuple[HeatModel, AppState] | None = None  # what the line below is about

    def compose(self) -> ComposeResult:
        yield Static(id="empty")
        yield Heatmap()
        yield LayerView()
        with HeatTable():
            yield Static(id="twin")
        yield Line(id="words")
        yield Legend()
        yield Line(id="caption")

    def entrance(self) -> Widget:
        widgets = [self.query_one(kind) for kind, _ in SHAPES]
        return next((w for w in widgets if w.display), widgets[0])

    def show(self, state: AppState) -> None:
        """Draw the experts of `state`."""
        blank = state.view.model is None or hints.dense(state)
        self.query_one("#empty").display = blank
        for kind, shape in SHAPES:
            self.query_one(kind).display = not blank and state.heat.shape == shape
        if blank:
            self._worded = None
            self.query_one("#empty", Static).update(Text(self._nothing(state)))
            self.query_one("#words", Line).put("")
            self.entitle(state.names)
            self.query_one(Legend).display = False
            return
        # The numeric modules load here, after the first paint.
        from tui.heat.model import heat_model
        from tui.heat.words import table

        model = heat_model(state)
        if model is None:
            return
        if state.heat.shape == "table":
            self.query_one("#twin", Static).update(table(model))
        elif state.heat.shape == "layer":
            self._show_layer(model, state)
        else:
            self._show_map(model, state)
        self._show_words(model, state)
        caption = self._caption(state, model)
        self.entitle(state.names, caption)
        selection = expert_selection.tally(state)
        self.query_one("#caption", Line).put(f"{selection} · {caption}" if selection else caption)
        self.subtitle(selection)

    def _show_map(self, model: HeatModel, state: AppState) -> None:
        from tui.heat.order import column

        cursor, anchor = (
            (row, column(model.order, row, expert))
            for row, expert in (state.cursor, state.anchor or state.cursor)
        )
        self.query_one(Heatmap).show(model, cursor, fit=state.heat.fit, anchor=anchor)

    def _show_layer(self, model: HeatModel, state: AppState) -> None:
        from tui.heat.layer import layer_model

        position, expert = state.cursor
        marked = expert_selection.marked(state)[position] if state.anchor is not None else None
        self.query_one(LayerView).show(layer_model(model, position), expert, marked)

    def on_map_laid_out(self) -> None:
        """The line below names the experts of a cell, which may be others now."""
        if self._worded is not None:
            self._show_words(*self._worded)

    def _show_words(self, model: HeatModel, state: AppState) -> None:
        """The line below the map, and the legend."""
        self._worded = model, state
        from tui.heat.words import explain

        words = hints.next_step(state) if not model.metric else ""
        words = (
            words
            or chat_actions.token_words(state)
            or explain(model, state.cursor, state.view.steering)
        )
        if state.heat.shape == "map":
            words = f"{self.query_one(Heatmap).range_here}{words}"
        words += self._brushed(state)
        if state.heat.shape == "layer":
            words += state.names.say(" · {escape}: the map")
        self.query_one("#words", Line).put(words)
        legend = self.query_one(Legend)
        legend.show(model)
        legend.display = bool(model.metric) and state.heat.shape == "map"

    @staticmethod
    def _nothing(state: AppState) -> str:
        """The text without a map: how to get a model, or that it has no experts."""
        if state.view.model is None:
            return hints.next_step(state)
        return no_experts(state.view.model.model_type, "show")

    @staticmethod
    def _brushed(state: AppState) -> str:
        """How many tokens of the newest answer the expert under the cursor served, while tinted."""
        turn = state.turns[-1] if state.turns else None
        if not state.brush or turn is None or not turn.pieces:
            return state.names.say(" · its tokens are highlighted ({brush})") if state.brush else ""
        some, of = served(turn, *state.cursor)
        return f" · {some} of the answer's {of} tokens routed to it"

    @staticmethod
    def _caption(state: AppState, model: HeatModel) -> str:
        metric, samples = model.metric, model.samples
        if not metric:
            return "not measured yet"
        ranked = " · by score" if state.heat.sort else ""
        scale = f"{model.scale} (auto)" if state.heat.scale == "auto" else f"{model.scale} scale"
        span = "per layer" if state.heat.per_layer else "whole model"
        live = state.frame is not None or (state.lit is not None and state.token is None)
        if state.compared is not None and metric.startswith("A-B "):
            return compared(state.compared, metric)
        stale = "STALE · " if state.view.heat is not None and state.view.heat.stale else ""
        return (
            f"{'LIVE · ' if live else stale}{metric} · {scale} · {span}{ranked} · {samples} samples"
        )
