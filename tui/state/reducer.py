"""The reducer: a pure function from state and event to the next state.

Clocks are arguments, so that tests can set the time.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxfun.calibration.reports import CollectReport, DiffReport, StatsReport
from mlxfun.evaluation.reports import ProbeReport
from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Notice,
    Progress,
    ResidencyFrame,
    RoutingFrame,
    Token,
)
from mlxfun.generation.reports import TokensReport
from mlxfun.report import Report
from mlxfun.session.reports import SessionView
from tui.state import chat_turns
from tui.state.app_state import (
    FULL_STEERING,
    LOG_LIMIT,
    PROBE_LINE,
    AppState,
    Entry,
    Job,
    Level,
    Offer,
)

if TYPE_CHECKING:
    from mlxfun.arrays import Array


LONG_LINE = 1000
"""Characters from which on a line that counts tokens is one of the screen itself."""


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
        case ResidencyFrame():
            return replace(state, held=event.held)
        case Token():
            return _token(state, event, now)
        case Notice() if event.level == "offer":
            offers = (*state.offers, Offer(event.text, event.line, event.about))
            state = replace(state, offers=offers)
            return _logged(state, Entry("warning", "", event.text))
        case Notice():
            level: Level = "warning" if event.level == "warning" else "info"
            return _logged(state, Entry(level, "", event.text))
        case JobEnded():
            return _ended(state, event)
        case _:
            return state


def _queued(state: AppState, event: JobQueued) -> AppState:
    ahead = state.job.line if state.job is not None else ""
    queued = (*state.queued, (event.job, event.line))
    turns = chat_turns.add_question(state.turns, event.job, event.line)
    if ahead != PROBE_LINE:  # that gives way to what the user asks
        turns = chat_turns.waiting(turns, event.job, ahead)
    return replace(state, queued=queued, turns=turns)


def _started(state: AppState, event: JobStarted, now: float) -> AppState:
    waiting = tuple(q for q in state.queued if q[0] != event.job)
    jobs = (*state.jobs, Job(event.job, event.line, now))
    if state.echo is not None and state.echo.level == "error":
        # An old failure beside a running command reads as if that had failed.
        state = replace(state, echo=None)
    # A line of a replay was never queued: its question shows from here on.
    asked = chat_turns.add_question(state.turns, event.job, event.line)
    asked = chat_turns.waiting(asked, event.job, "")
    return replace(state, jobs=jobs, queued=waiting, turns=asked)


def _token(state: AppState, event: Token, now: float) -> AppState:
    # A token ends the step whose progress its job reported.
    jobs = tuple(replace(j, progress=None) if j.id == event.job else j for j in state.jobs)
    state = replace(state, jobs=jobs, turns=chat_turns.add_token(state.turns, event, now))
    turn = chat_turns.find(state.turns, event.job)
    if event.experts is None or state.view.heat is None:
        return state
    if turn is not None and turn.both and event.side != _live_of_both(state.view):
        # Two answers grow at once: the map shows the live side only, so that it does not flicker.
        return state
    first = turn is None or event.index == 0
    traffic = add_traffic(None if first else state.traffic, event.experts, state.view.heat.experts)
    return replace(state, traffic=traffic, lit=event.experts, token=None)


def _live_of_both(view: SessionView) -> str:
    """The live side of an A/B answer; without a plan the candidate, which is the current model."""
    return view.live if view.plan is not None else "candidate"


def add_traffic(traffic: Array | None, experts: Array, count: int) -> Array:
    """A new float64 [L, count]: `traffic` plus one for each of `experts` int [L, K]; -1 is none."""
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
        state = replace(state, jobs=jobs, frame=None, held=None, lit=None, token=None)
    waiting = chat_turns.waiting(state.turns, event.job, "")
    state = replace(state, turns=chat_turns.finish(waiting, event))
    if event.error is None:
        state = _anew(state, event.line)
    if isinstance(event.report, ProbeReport):
        state = replace(state, probe=event.report)
    if event.report is not None and event.report.kind == "save":
        state = replace(state, saved=state.saved | {state.view.state})
    if event.report is not None and event.report.kind == "settings":
        state = replace(state, limits=_limits(event.report))
    state = _kept(state, event)
    if isinstance(event.report, DiffReport):
        heat = replace(state.heat, metric="A-B reap_sum")
        state = replace(state, compared=event.report, heat=heat)
    if event.line == PROBE_LINE:
        # The screen probed by itself: that is not logged.
        return state
    if isinstance(event.report, TokensReport) and len(event.line) >= LONG_LINE:
        # A pasted text would fill the log; its length is what matters.
        return replace(state, echo=Entry("info", "", f"in the field: {event.report.summary()}"))
    if event.report is not None:
        state = replace(state, lines=(*state.lines, event.line)[-LOG_LIMIT:])
    return _logged(state, _outcome(event))


def _anew(state: AppState, line: str) -> AppState:
    """Without what belongs to a conversation or a model that was before the line that ended."""
    if chat_turns.begins_anew(line):
        state = replace(state, turns=(), token=None)
    if chat_turns.loads(line):
        heat = replace(state.heat, metric=None)
        state = replace(state, traffic=None, probe=None, compared=None, token=None, heat=heat)
    return state


def _kept(state: AppState, event: JobEnded) -> AppState:
    """What is in a file and what is not, after a job."""
    report = event.report
    if report is None:
        return state
    if isinstance(report, CollectReport):
        state = replace(state, unkept=True)
    elif isinstance(report, StatsReport) and report.action in ("save", "load", "reset"):
        state = replace(state, unkept=False)
    elif report.kind == "record":
        recording = report.data()["path"] if report.data()["action"] == "recording to" else None
        state = replace(state, recording=recording or "")
    elif chat_turns.loads(event.line):
        state = replace(state, unkept=False)
    if chat_turns.loads(event.line):
        state = replace(state, offers=tuple(o for o in state.offers if _of_model(o, event.line)))
    taken = event.line.split(None, 1)[:1]
    return replace(
        state, offers=tuple(o for o in state.offers if o.line.split(None, 1)[:1] != taken)
    )


def _of_model(offer: Offer, line: str) -> bool:
    """Whether an offer is of the model that `line` has loaded, or of no particular one."""
    if not offer.about or offer.about == "no model":
        return True
    named = [os.path.abspath(word) for word in chat_turns.split(line)[1:]]
    return os.path.abspath(offer.about) in named


def _outcome(event: JobEnded) -> Entry:
    """The entry of the log for a job."""
    if event.report is not None:
        return Entry("ok", event.line, event.report.summary(), event.report, event.seconds)
    level: Level = "info" if event.cancelled else "error"
    text = event.error or "failed without a message"
    return Entry(level, event.line, text, None, event.seconds)


def _limits(report: Report) -> tuple[tuple[str, float], ...]:
    """The guardrails of apply among the shell's settings."""
    settings = report.data()["settings"]
    named = ((name, settings.get(name)) for name in ("max-kl", "max-perplexity-ratio", "max-loops"))
    return tuple((name, value) for name, value in named if value is not None)


def _logged(state: AppState, entry: Entry) -> AppState:
    log = state.log
    if log and all(e.level == "ok" and e.line.startswith(FULL_STEERING) for e in (log[-1], entry)):
        # A fader on its way leaves one report, not one for each step.
        log = log[:-1]
    return replace(state, log=(*log, entry)[-LOG_LIMIT:], echo=entry)


def speed(state: AppState, now: float) -> float | None:
    """Tokens per second of the answer being generated, None when none is or none is known."""
    turn = state.turns[-1] if state.turns else None
    if turn is None or turn.done or turn.tokens < 2 or now <= turn.began:
        return None
    return (turn.tokens - 1) / (now - turn.began)
