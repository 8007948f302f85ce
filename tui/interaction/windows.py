"""Windows that open with a report: an expert's profile, a map of a forward, the models to load."""

from __future__ import annotations

from rich.text import Text
from textual import on

from mlxfun.events import JobEnded
from mlxfun.memory.plan.report import LocalModel, ModelsReport
from mlxfun.scans.reports import DossierReport
from mlxfun.text import readable_bytes
from mlxfun.tracing.reports import AttributionReport
from tui.input import actions
from tui.interaction.base import KeyHandlers
from tui.messages import Stepped
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.dialogs.pick import Choice, PickScreen
from tui.widgets.experts.dossier_screen import DossierScreen
from tui.widgets.experts.expert_profile import dossier_page
from tui.widgets.inside.grid import grid_of
from tui.widgets.inside.map_screen import MapScreen
from tui.widgets.inside.shares import shares_page


class Windows(KeyHandlers):
    """The part of the application that shows some reports in a window of their own."""

    _dossier, _step = "dossier", 0  # the newest line that the arrows of the dossier ran; its job

    def _open(self, event: JobEnded) -> None:
        """Open the window of a report that has one, for a line that was typed or a key's."""
        report, opened = event.report, event.job == self._opened
        if isinstance(report, DossierReport) and opened:
            self._show_dossier(report, stepped=event.job == self._step)
        elif isinstance(report, ModelsReport):
            self._pick_model(report)
        elif isinstance(report, AttributionReport) and opened:
            self.push_screen(HelpScreen(shares_page(report)))
        elif report is not None and (grid := grid_of(report)) is not None:
            self.push_screen(MapScreen(grid), self._follow)

    def _follow(self, line: str | None) -> None:
        """Run what was chosen in a window, and open what comes of it."""
        if line:
            self._opened = self._run(line)

    def _show_dossier(self, report: DossierReport, *, stepped: bool) -> None:
        page = dossier_page(report, self.state)
        if isinstance(self.screen, DossierScreen):
            self.screen.show(page)
        elif not stepped:  # else the window was closed meanwhile
            names = self.state.names
            self.push_screen(
                DossierScreen(page, names.say("{left} {right} experts, {escape} closes"))
            )

    @on(Stepped)
    def _stepped(self, event: Stepped) -> None:
        """Go on to another expert of the layer that is not pruned; the map's cursor goes along."""
        state = self.state
        heat, (position, expert) = state.view.heat, state.cursor
        if heat is None or not heat.alive[position].any():
            return
        expert = (expert + event.by) % heat.experts
        while not heat.alive[position, expert]:
            expert = (expert + event.by) % heat.experts
        # A profile that is still being made is not waited for.
        self.engine.cancel(only=self._dossier)
        self._change(actions.put(state, position, expert))
        name = f"{heat.layers[position]}:{expert}"
        self._dossier = f"dossier {name}"
        self._opened = self._step = self._run(self._dossier)
        if isinstance(self.screen, DossierScreen):
            self.screen.wait(name)

    def _pick_model(self, report: ModelsReport) -> None:
        """List the models on this machine; the one that is taken is loaded in the way that it fits."""

        def taken(line: str | None) -> None:
            if line is not None:
                self.enter_line(line)

        self.push_screen(PickScreen("load a model", model_choices(report), "part of a name"), taken)


def model_choices(report: ModelsReport) -> list[Choice]:
    """A row for each model: its name, its size in memory, how it fits."""
    name = max((len(model.source) for model in report.models), default=0)
    rows = []
    for model in report.models:
        size = readable_bytes(model.bytes) if model.bytes else "?"
        style = "dim" if model.fit == "no" or model.problem else ""
        shown = Text(f"{model.source:<{min(name, 48)}}  {size:>9}  {model.origin:<9}  ", style)
        shown.append(model.words)
        rows.append(Choice(model.line, shown, _estimate(model, report.memory)))
    return rows


def _estimate(model: LocalModel, memory: int | None) -> str:
    """What loading a model takes, and the line that does it."""
    if model.problem:
        return model.problem
    room = "" if memory is None else f" of the {readable_bytes(memory)} that it may have"
    return f"takes {readable_bytes(model.bytes)}{room}: {model.words}. Enter runs: {model.line}"
