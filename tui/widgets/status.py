"""The status line about model and work; the least important parts are dropped first when it is
full.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from commands.conditions import edited, steering_in_force
from mlxfun.text import readable_bytes
from tui.state.app_state import AppState, Job
from tui.state.reducer import speed
from tui.text import SHOWN_SIDES, count, duration, shortened
from tui.widgets.line import Line

BAR = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of the line. rank: pieces with the highest are dropped first."""

    rank: int
    text: Text


def job_text(job: Job, now: float, outer: Job | None = None) -> Text:
    """The running job with bar, figures, rate and remaining time, as far as known.

    outer: the script that it is a command of.
    """
    text = Text("▶ ", style=Style(bold=True, color="green"))
    if outer is not None and outer.progress is not None:
        text.append(f"{outer.line.split(None, 1)[0]}: {outer.progress.label} ▸ ", "not bold")
    name = job.line.split(None, 1)[0]
    progress = job.progress
    if progress is None:
        return text.append(f"{name} {duration(max(0.0, now - job.started))}", "not bold")
    label = progress.label if name in progress.label else f"{name}: {progress.label}"
    text.append(f"{shortened(label, 28)} ", "not bold")
    if progress.total:
        full = round(min(progress.done / progress.total, 1.0) * BAR)
        text.append("━" * full)
        text.append("─" * (BAR - full), Style(dim=True, bold=False))
        done = count(progress.done, progress.unit)
        if progress.unit not in ("B", "bytes"):
            done = f"{progress.done:,}"
        text.append(f" {done}/{count(progress.total, progress.unit)}", "not bold")
    elif progress.done:
        text.append(count(progress.done, progress.unit), "not bold")
    if progress.rate > 0:
        text.append(f" {count(round(progress.rate, 1), progress.unit)}/s", "not bold")
    if progress.eta:
        text.append(f" ETA {duration(progress.eta)}", "not bold")
    return text


def badges(state: AppState) -> list[str]:
    """What must not be forgotten, in a word each."""
    view, out = state.view, []
    if state.recording:
        out.append("REC")
    if view.heat is not None and view.heat.stale:
        out.append("STALE")
    if view.steering is not None and steering_in_force(view):
        now = view.steering
        counts = (
            ("▲", sum(map(len, now.activated.values()))),
            ("▼", sum(map(len, now.deactivated.values()))),
            ("±", sum(map(len, now.levels.values()))),
        )
        out.append(" ".join(["STEERED", *(f"{sign}{count}" for sign, count in counts if count)]))
    if view.steering is not None and view.steering.interventions:
        count = len(view.steering.interventions)
        out.append("INTERVENED" if count == 1 else f"INTERVENED {count}")
    if edited(view) and view.state not in state.saved:
        out.append("EDITED")
    return out


def parts(state: AppState, now: float) -> list[Part]:
    """The pieces of the line, left to right."""
    view, out = state.view, list[Part]()
    if view.model is not None:
        live = Style(bold=True, reverse=view.live == "candidate")
        out.append(Part(3, Text(view.model.model_type, Style(bold=True))))
        out.append(Part(1, Text.assemble("state ", view.state[:8] or "?")))
        if view.plan is not None:
            out.append(Part(1, Text.assemble("live ", (f" {SHOWN_SIDES[view.live]} ", live))))
    if state.job is not None:
        out.append(
            Part(0, job_text(state.job, now, state.jobs[0] if len(state.jobs) > 1 else None))
        )
    if state.queued:
        out.append(Part(2, Text(f"{len(state.queued)} queued")))
    tokens = speed(state, now)
    if tokens is not None:
        out.append(Part(2, Text(f"{tokens:.0f} tokens/s")))
    if view.memory_active:
        limit = f"/{readable_bytes(view.memory_limit)}" if view.memory_limit else ""
        out.append(Part(5, Text(f"mem {readable_bytes(view.memory_active)}{limit}")))
    if view.history is not None:
        budget = f"/{readable_bytes(view.history.budget)}" if view.history.budget else ""
        out.append(Part(6, Text(f"undo {readable_bytes(view.history.bytes_held)}{budget}")))
    if view.counting:
        out.append(Part(4, Text("counting chat")))
    out += [Part(1, Text(f" {name} ", Style(bold=True, reverse=True))) for name in badges(state)]
    return out or [Part(0, Text("no model" if state.rows else "starting"))]


def status_text(state: AppState, width: int, now: float) -> Text:
    """The line, at most `width` columns."""
    pieces = parts(state, now)
    divider = " │ "
    while len(pieces) > 1 and _width(pieces, divider) > width:
        pieces.remove(max(pieces, key=lambda part: part.rank))
    text = Text(divider, style="dim", no_wrap=True, overflow="ellipsis").join(
        [part.text for part in pieces]
    )
    text.truncate(max(1, width), overflow="ellipsis")
    return text


def _width(pieces: list[Part], divider: str) -> int:
    return sum(part.text.cell_len for part in pieces) + len(divider) * (len(pieces) - 1)


class StatusLine(Line):
    """Draws `status_text`."""

    DEFAULT_CSS = """
    StatusLine { height: 1; padding: 0 1; background: $panel; color: $foreground; }
    """

    def show(self, state: AppState, now: float) -> None:
        """Draw the line for `state` at clock `now`."""
        room = self.app.size.width - 2
        self.put(status_text(state, room, now))
