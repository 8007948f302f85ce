"""A command engine without a model, a thread or a clock: it moves only when told to.

`run` queues; each `step` delivers exactly one event of the running job. The scripts below play a
whole session (load, collect, prune, preview, chat, steer, apply, undo, save) on a model of six
layers and sixteen experts whose heat is a smooth, fixed surface.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from commands.completion import Completion
from commands.forms.form import Form, completions, filled_in, form_of
from commands.registry import Row
from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Notice,
)
from mlxfun.report import Report, TextReport
from mlxfun.serving.snapshot import ServingReport
from mlxfun.session.reports import SessionView
from tests.fake_selection import COMMANDS as SELECTION
from tests.fake_selection import FakeSelection
from tests.fake_session import FakeSession


@dataclass(frozen=True, slots=True)
class FakeCompletion:
    text: str
    start: int
    hint: str


@dataclass(frozen=True, slots=True)
class QuitReport(Report):
    kind: ClassVar[str] = "quit"

    def summary(self) -> str:
        return "bye"


# name, group, help, usage, when: "" always, else what must exist
COMMANDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("load", "model", "Load a model.", "load MODEL", ""),
    ("info", "model", "Describe the resident model.", "info [--verify]", "model"),
    ("layers", "model", "Show the anatomy as a table.", "layers", "model"),
    ("collect", "observe", "Calibrate on a data set.", "collect [OPTIONS]", "model"),
    ("stats", "observe", "Show, save or load statistics.", "stats [ACTION] [PATH]", "model"),
    ("why", "observe", "Say why an expert goes or stays.", "why EXPERT", "stats"),
    ("prune", "edit", "Stage a prune.", "prune [OPTIONS]", "stats"),
    ("steer", "edit", "Force experts in or out.", "steer [OPTIONS]", "model"),
    ("preview", "measure", "Measure the staged model.", "preview [OPTIONS]", "plan"),
    ("evaluate", "measure", "Measure the model.", "evaluate [OPTIONS]", "model"),
    ("chat", "chat", "Talk to the live model.", "chat TEXT", "model"),
    ("apply", "edit", "Commit the staged plan.", "apply [OPTIONS]", "plan"),
    ("discard", "edit", "Drop the staged plan.", "discard", "plan"),
    ("flip", "edit", "Swap base and candidate.", "flip", "plan"),
    ("undo", "history", "Take the last step back.", "undo", "undo"),
    ("redo", "history", "Repeat the step taken back.", "redo", "redo"),
    ("goto", "history", "Go to any state.", "goto NODE", "model"),
    ("history", "history", "Show the tree of states.", "history", "model"),
    ("save", "model", "Write the model.", "save PATH [OPTIONS]", "model"),
    ("tokens", "chat", "Count tokens.", "tokens TEXT", "model"),
    ("resume", "shell", "Bring a session back.", "resume [PATH]", ""),
    *SELECTION,
    ("serve", "shell", "Show the server.", "serve [ACTION]", ""),
    ("help", "shell", "Explain a command.", "help [COMMAND]", ""),
    ("quit", "shell", "Leave the shell.", "quit", ""),
)

REASONS = {
    "model": "load a model first",
    "stats": "calibrate first: collect --dataset demo:mixed",
    "plan": "nothing is staged: prune --n-prune 4",
    "undo": "nothing to undo",
    "redo": "nothing to redo",
}


class FakeEngine(FakeSession, FakeSelection):
    """See the module. layers, experts: the size of the pretended model."""

    def __init__(self, layers: int = 6, experts: int = 16) -> None:
        self.layers, self.experts = layers, experts
        self.lines: list[str] = []
        self.cancelled = 0
        self.closed: float | None = None
        self._listeners: list[Callable[[Event], None]] = []
        self._waiting: list[tuple[int, str]] = []
        self._running: tuple[int, str] | None = None
        self._script: Iterator[Event | Report] | None = None
        self._jobs = 0
        self._cancel = False
        self._asked: list[str] = []
        self._view = SessionView()
        self.left: Notice | None = None
        self.served: ServingReport | None = None

    # The engine's interface -------------------------------------------------------------------
    def serving(self) -> ServingReport | None:
        return self.served

    @property
    def busy(self) -> str | None:
        return self._running[1] if self._running else None

    @property
    def queue(self) -> tuple[str, ...]:
        return tuple(line for _, line in self._waiting)

    @property
    def recording(self) -> Path | None:
        return None

    @property
    def chat_defaults(self) -> dict[str, float]:
        return {"temperature": 0.0, "max_tokens": 256, "seed": 7}

    def offer(self) -> None:
        if self.left is not None:
            self._emit(self.left)

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        self._listeners.append(listener)

    def run(self, line: str) -> int:
        self._jobs += 1
        self.lines.append(line)
        self._waiting.append((self._jobs, line))
        self._emit(JobQueued(self._jobs, line))
        return self._jobs

    def cancel(self, only: str | None = None) -> None:
        if only is not None and self.busy != only:
            return
        self.cancelled += 1
        self._cancel = True

    def complete(self, line: str) -> list[FakeCompletion]:
        words = line.split(" ")
        start = len(line) - len(words[-1])
        if len(words) == 1:
            options = [(name, help_) for name, _, help_, _, _ in COMMANDS]
        elif words[-2] == "--dataset":
            options = [("demo:mixed", "a bit of everything"), ("demo:eval", "held out")]
        else:
            options = [("--dataset", "what to read"), ("--n-prune", "experts a layer")]
        return [FakeCompletion(t, start, h) for t, h in options if t.startswith(words[-1])]

    def form(self, line: str) -> Form | None:
        return form_of(line)

    def filled_in(self, line: str, name: str, text: str) -> str:
        return filled_in(line, name, text)

    def complete_field(self, line: str, name: str, text: str) -> list[Completion]:
        return completions(line, name, text, self._view)

    def help(self, name: str | None, width: int = 78) -> str:
        for command, _, text, usage, _ in COMMANDS:
            if command == name:
                return f"{usage}\n\n{text}"
        return "\n".join(f"{c[0]}: {c[2]}" for c in COMMANDS)

    def view(self) -> SessionView:
        served = self.served
        return self._view if served is None else replace(self._view, serving=served.address)

    def rows(self) -> tuple[Row, ...]:
        have = self._have()
        return tuple(
            Row(n, g, h, u, None, False, False, not w or w in have, REASONS[w] if w else "")
            if w and w not in have
            else Row(n, g, h, u, None, False, False, True, "")
            for n, g, h, u, w in COMMANDS
        )

    def close(self, timeout: float = 5.0) -> None:
        self.closed = timeout

    # Time -------------------------------------------------------------------------------------
    def step(self, count: int = 1) -> None:
        """Deliver the next `count` events; does nothing when there is no job."""
        for _ in range(count):
            self._step()

    def finish(self) -> None:
        """Deliver everything that is queued."""
        while self._running or self._waiting:
            self._step()

    def play(self, *lines: str) -> None:
        """Run lines from start to end, before or while a screen listens."""
        for line in lines:
            self.run(line)
            self.finish()

    def notice(self, level: str, text: str) -> None:
        """Emit a notice out of the blue."""
        self._emit(Notice(level, text))

    def _step(self) -> None:
        if self._running is None:
            if self._waiting:
                self._running = job, line = self._waiting.pop(0)
                self._cancel = False
                self._script = self._scripted(job, line)
                self._emit(JobStarted(job, line))
            return
        job, line = self._running
        assert self._script is not None
        if self._cancel:
            self._end(JobEnded(job, line, None, "cancelled", 1.0, self._view.state, True))
            return
        try:
            event = next(self._script)
        except ValueError as error:
            usage = "unknown command" in str(error)
            self._end(JobEnded(job, line, None, str(error), 0.0, self._view.state, usage=usage))
            return
        if isinstance(event, Report):
            seconds = 12.5 if line.startswith("collect") else 0.4
            self._end(JobEnded(job, line, event, None, seconds, self._view.state))
        else:
            self._emit(event)

    def _end(self, ended: JobEnded) -> None:
        self._running = self._script = None
        self._emit(ended)

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    # The pretended session --------------------------------------------------------------------
    def _have(self) -> set[str]:
        view, have = self._view, set[str]()
        if view.model:
            have.add("model")
        if view.heat and view.heat.metrics:
            have.add("stats")
        if view.plan:
            have.add("plan")
        if view.history and view.history.current == 1:
            have.add("undo")
        if view.history and len(view.history.nodes) > 1 and view.history.current == 0:
            have.add("redo")
        return have

    def _scripted(self, job: int, line: str) -> Iterator[Event | Report]:
        words = shlex.split(line)
        script = getattr(self, f"_do_{words[0]}", None)
        if script is None:
            if words[0] not in {name for name, *_ in COMMANDS}:
                raise_later = ValueError(f"unknown command {words[0]!r}; did you mean 'collect'?")
            else:
                yield QuitReport() if words[0] == "quit" else TextReport(f"{words[0]} done")
                return
            raise raise_later
        row = next(r for r in self.rows() if r.name == words[0])
        if not row.enabled:
            raise ValueError(row.reason)
        yield from script(job, words[1:])
