"""The state of the screen: frozen data, and a pure function from event to next state.

Nothing here knows a widget. Clocks come in as arguments, so that a test can say what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mlxfun.calibration.reports import DiffReport
from mlxfun.evaluation.reports import ProbeReport
from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Notice,
    Progress,
    RoutingFrame,
    Token,
)
from mlxfun.report import Report
from mlxfun.session.reports import SessionView
from tui.input import transcript_model
from tui.input.key_labels import USUAL, Names
from tui.input.steering_mixer import Channel
from tui.input.transcript_model import Turn

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from tui.ports import Row

LOG_LIMIT = 200
FADED = "steer --clear"
"""How a line begins that names a whole steering: the one before it is history."""
QUIET_LINE = "probe --tokens 512"
"""The one command line that the screen sends by itself: it leaves no word in the log."""


@dataclass(frozen=True, slots=True)
class Job:
    """The running job. started: the clock, in seconds, when the worker took it up."""

    id: int
    line: str
    started: float
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Talk:
    """How the chat field asks. None: the shell's default.

    both: base and candidate are asked; revise: how many turns the next text takes back first.
    """

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    thinking: bool | None = None
    both: bool = False
    revise: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log. level: "ok", "info", "warning" or "error"; line: the command, if any."""

    level: str
    line: str
    text: str
    report: Report | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class HeatOptions:
    """How the heatmap is drawn. metric None: the best there is. fit: pool to the width, no pan.
    shape: "map", "layer" (the one under the cursor, expert by expert) or "table" (the map in words).
    sort: each layer's experts by score."""

    metric: str | None = None
    log: bool = False
    per_layer: bool = True
    fit: bool = True
    shape: str = "map"
    sort: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Experts picked by hand that are not a command line yet.

    gone: bool [L, E]; since: the clock at the last pick; sent: its command line is on its way.
    """

    gone: Array
    since: float
    sent: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AppState:
    """Everything the screen shows.

    names: what the keys are called, in every sentence.
    jobs: what runs, the innermost last: a replay runs its lines as jobs inside its own.
    frame: the running calibration's newest heat. traffic: float64 [L, E], times each expert served
    the newest answer. lit: int32 [L, K], the experts of the newest token while one is generated;
    when both sides answer, both are those of the live side.
    cursor: (position of the MoE layer, expert); anchor: the other corner of a range. draft: picks
    by hand; probe: the newest quick measurement; probed: the state of the plan that was probed, or
    "-" when plans cannot be. talk: the chat's settings; token: (job, index) of the token under the
    transcript's cursor; brush: the tokens that the expert under the cursor served are tinted. mixer: the steering's channels; mixing:
    its newest command line. compared: the last two files of statistics that were compared. limits: the guardrails that were set; marked: the state
    that others are compared with. echo: the newest thing worth saying. lines: the
    command lines that succeeded. panel: the focused one; beside: the last focused or
    revealed that is not the heatmap; upper: the plan or the
    mixer, whichever was last; front: the last of all, for screens with room for one; unseen: panels with news that nobody has
    looked at; saved: the states of weights that were written to disk; zoomed: the focused one has the screen to itself.
    """

    view: SessionView = field(default_factory=SessionView)
    rows: tuple[Row, ...] = ()
    names: Names = USUAL
    jobs: tuple[Job, ...] = ()
    queued: tuple[tuple[int, str], ...] = ()
    frame: RoutingFrame | None = None
    traffic: Array | None = None
    lit: Array | None = None
    turns: tuple[Turn, ...] = ()
    log: tuple[Entry, ...] = ()
    echo: Entry | None = None
    lines: tuple[str, ...] = ()
    heat: HeatOptions = HeatOptions()
    cursor: tuple[int, int] = (0, 0)
    anchor: tuple[int, int] | None = None
    draft: Draft | None = None
    probe: ProbeReport | None = None
    probed: str = ""
    talk: Talk = Talk()
    token: tuple[int, int] | None = None
    brush: bool = False
    mixer: tuple[Channel, ...] = ()
    mixing: str = ""
    compared: DiffReport | None = None
    limits: tuple[tuple[str, float], ...] = ()
    marked: int | None = None
    panel: str = "experts"
    beside: str = "chat"
    upper: str = "plan"
    front: str = "experts"
    unseen: frozenset[str] = frozenset()
    saved: frozenset[str] = frozenset()
    zoomed: bool = False

    @property
    def job(self) -> Job | None:
        """What runs right now."""
        return self.jobs[-1] if self.jobs else None

    def last_line(self, name: str) -> str | None:
        """The newest command line that began with `name` and succeeded."""
        return next((ln for ln in reversed(self.lines) if ln.split(None, 1)[0] == name), None)

    def row(self, name: str) -> Row | None:
        """The command called `name`, as the engine last declared it."""
        return next((row for row in self.rows if row.name == name), None)


def reduce(state: AppState, event: Event, now: float) -> AppState:
    """The state after `event`. now: the clock in seconds. The caller renews `view` and `rows`."""
    match event:
        case JobQueued():
            return _queued(state, event)
        case JobStarted():
            return _started(state, event, now)
        case Progress():
            jobs = tuple(
                replace(job, progress=event) if job.id == event.job else job for job in state.jobs
            )
            return replace(state, jobs=jobs)
        case RoutingFrame():
            return replace(state, frame=event)
        case Token():
            return _token(state, event, now)
        case Notice():
            return _logged(state, Entry(event.level, "", event.text))
        case JobEnded():
            return _ended(state, event)
        case _:
            return state


def _queued(state: AppState, event: JobQueued) -> AppState:
    queued = (*state.queued, (event.job, event.line))
    return replace(
        state, queued=queued, turns=transcript_model.ask(state.turns, event.job, event.line)
    )


def _started(state: AppState, event: JobStarted, now: float) -> AppState:
    waiting = tuple(q for q in state.queued if q[0] != event.job)
    jobs = (*state.jobs, Job(event.job, event.line, now))
    # A line of a replay was never queued: its question shows from here on.
    asked = transcript_model.ask(state.turns, event.job, event.line)
    return replace(state, jobs=jobs, queued=waiting, turns=asked)


def _token(state: AppState, event: Token, now: float) -> AppState:
    # A token ends the step that its job told progress of.
    jobs = tuple(replace(j, progress=None) if j.id == event.job else j for j in state.jobs)
    state = replace(state, jobs=jobs, turns=transcript_model.hear(state.turns, event, now))
    turn = transcript_model.find(state.turns, event.job)
    if event.experts is None or state.view.heat is None:
        return state
    if turn is not None and turn.both and event.side != _live_of_both(state.view):
        # Two answers grow at once: the map stays with the model that would run, and does not flicker.
        return state
    first = turn is None or event.index == 0
    traffic = add_traffic(None if first else state.traffic, event.experts, state.view.heat.experts)
    return replace(state, traffic=traffic, lit=event.experts, token=None)


def _live_of_both(view: SessionView) -> str:
    """The side of an A/B that is live. Without a plan it is the model as it is, against the
    checkpoint."""
    return view.live if view.plan is not None else "candidate"


def add_traffic(traffic: Array | None, experts: Array, count: int) -> Array:
    """A new float64 [L, count] with one more for each of `experts` int [L, K]; -1 is nobody."""
    # Imported here because the first paint comes before anything numeric is needed.
    import numpy as np

    total = np.zeros((experts.shape[0], count)) if traffic is None else traffic.copy()
    rows, slots = np.nonzero((experts >= 0) & (experts < count))
    total[rows, experts[rows, slots]] += 1
    return total


def _ended(state: AppState, event: JobEnded) -> AppState:
    state = replace(state, queued=tuple(q for q in state.queued if q[0] != event.job))
    if any(job.id == event.job for job in state.jobs):
        jobs = tuple(job for job in state.jobs if job.id != event.job)
        state = replace(state, jobs=jobs, frame=None, lit=None, token=None)
    state = replace(state, turns=transcript_model.close(state.turns, event))
    if event.error is None and transcript_model.begins_anew(event.line):
        state = replace(state, turns=(), token=None)
    if isinstance(event.report, ProbeReport):
        state = replace(state, probe=event.report)
    if event.report is not None and event.report.kind == "save":
        state = replace(state, saved=state.saved | {state.view.state})
    if event.report is not None and event.report.kind == "settings":
        state = replace(state, limits=_limits(event.report))
    if isinstance(event.report, DiffReport):
        heat = replace(state.heat, metric="A-B reap_sum")
        state = replace(state, compared=event.report, heat=heat)
    if event.line == QUIET_LINE:
        # The screen asked by itself: whoever picks experts is not interrupted with it.
        return state
    if event.report is not None:
        state = replace(state, lines=(*state.lines, event.line)[-LOG_LIMIT:])
        text, level = event.report.summary(), "ok"
    else:
        text = event.error or "failed without a message"
        level = "info" if event.cancelled else "error"
    return _logged(state, Entry(level, event.line, text, event.report, event.seconds))


def _limits(report: Report) -> tuple[tuple[str, float], ...]:
    """The guardrails among the shell's settings."""
    settings = report.data()["settings"]
    named = ((name, settings.get(name)) for name in ("max-kl", "max-perplexity-ratio"))
    return tuple((name, value) for name, value in named if value is not None)


def _logged(state: AppState, entry: Entry) -> AppState:
    log = state.log
    if log and all(e.level == "ok" and e.line.startswith(FADED) for e in (log[-1], entry)):
        # A fader on its way leaves one report, not one for each step.
        log = log[:-1]
    return replace(state, log=(*log, entry)[-LOG_LIMIT:], echo=entry)


def speed(state: AppState, now: float) -> float | None:
    """Tokens per second of the answer being generated, None when none is or none is known."""
    turn = state.turns[-1] if state.turns else None
    if turn is None or turn.done or turn.tokens < 2 or now <= turn.began:
        return None
    return (turn.tokens - 1) / (now - turn.began)
