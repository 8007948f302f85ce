"""Windows that open with a report: an expert's profile, a map of a forward, the models to load."""

from __future__ import annotations

from rich.text import Text

from mlxfun.events import JobEnded
from mlxfun.memory.plan.report import LocalModel, ModelsReport
from mlxfun.scans.reports import DossierReport
from mlxfun.text import readable_bytes
from mlxfun.tracing.reports import AttributionReport
from tui.interaction.base import KeyHandlers
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.dialogs.pick import Choice, PickScreen
from tui.widgets.experts.expert_profile import dossier_page
from tui.widgets.inside.grid import grid_of
from tui.widgets.inside.map_screen import MapScreen
from tui.widgets.inside.shares import shares_page


class Windows(KeyHandlers):
    """The part of the application that shows some reports in a window of their own."""

    def _open(self, event: JobEnded) -> None:
        """Open the window of a report that has one, for a line that was typed or a key's."""
        report, opened = event.report, event.job == self._opened
        if isinstance(report, DossierReport) and opened:
            self.push_screen(HelpScreen(dossier_page(report, self.state)))
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
