"""The engine behind every front end: runs command lines on the worker thread and emits events.

The screen, the line-by-line shell and the headless runner are listeners of it. Every typed line,
key and palette entry goes through `Engine.run`, so a recorded session is complete by construction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from commands import completion, registry
from commands.completion import Completion
from commands.declare import Call, Command
from commands.forms import form
from commands.forms.form import Form
from commands.registry import Parsed, Row
from commands.scripts import resume
from commands.workbench.files import Files
from commands.workbench.interleave import During, Interleaved
from commands.workbench.journal import Journal
from commands.workbench.settings import Settings
from commands.workbench.wiring import Server, Wiring
from commands.workbench.workbench import Workbench
from mlxfun.calibration.reports import CollectReport
from mlxfun.context import SILENT, Context
from mlxfun.errors import MlxfunError
from mlxfun.events import Event, JobEnded, Notice, Token
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report
from mlxfun.session.reports import SessionView
from mlxfun.session.worker import Worker
from mlxfun.text import brief

if TYPE_CHECKING:
    from mlxfun.serving.service import Service
    from mlxfun.serving.snapshot import ServingReport
    from mlxfun.session.session import Session

__all__ = ["Completion", "Engine", "Row"]

log = logging.getLogger(__name__)

Listener = Callable[[Event], None]


def real_session(ctx: Context) -> type[Session]:
    """The class `Session`. Imports MLX, so only the worker calls it, after the first paint."""
    ctx.progress("importing MLX", 0)
    from mlxfun.session.session import Session

    ctx.check()
    return Session


class Engine:
    """One shell. Only `close` blocks; no method raises for an invalid line.

    seed: default of every command that draws. undo_budget: bytes the history may hold.
    output_root: commands write below it only. keep_going: replays go on after a failed command.
    keys: the user's, which help pages name instead of the declared ones.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        undo_budget: int | None = None,
        output_root: Path | None = None,
        keep_going: bool = False,
        session_class: Callable[[Context], type[Session]] = real_session,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._help_text = partial(registry.help_text, keys=keys)
        self._view = SessionView()
        self._bench = Workbench(
            Wiring(session_class, self._nested, registry.meant, self._help_text),
            journal=Journal(seed, lambda text: self._emit(Notice("warning", text))),
            settings=Settings(seed=seed),
            files=Files(output_root),
            undo_budget=undo_budget,
        )
        self._bench.keep_going = keep_going
        self._service: Service | None = None
        self._worker = Worker(self._emit, after=self._refresh, finish=self._bench.close)
        self._alive = True
        self._tokens = 0  # of the recorded command that is running

    @property
    def busy(self) -> str | None:
        """The command line that is running, None if none is."""
        return self._worker.busy

    @property
    def queue(self) -> tuple[str, ...]:
        """The command lines that wait."""
        return self._worker.queue

    @property
    def alive(self) -> bool:
        """Whether the worker still runs: True after `close` only when it did not stop in time."""
        return self._alive

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with every event; it must return quickly.

        It is called on the worker's thread, and for `JobQueued`, lines that do not parse, help and
        quit on the thread that called `run`.
        """
        self._listeners = (*self._listeners, listener)

    def record(self, path: Path) -> Path | None:
        """Record to `path` from the start; call it before the first `run`. See `Journal.attach`."""
        return self._bench.journal.attach(path)

    @property
    def recording(self) -> Path | None:
        """The file that is being recorded to."""
        return self._bench.journal.path

    @property
    def chat_defaults(self) -> Mapping[str, float]:
        """Temperature, max_tokens and seed of answers that do not say; see `set`."""
        now = self._bench.settings
        return {
            "temperature": now.temperature, "max_tokens": now.max_tokens, "seed": now.seed,
        }  # fmt: skip

    def keep(self, folder: Path) -> None:
        """Keep the session in `folder` until `forget`, so that it survives a crash.

        Raises OSError.
        """
        self._bench.sessions = folder
        resume.keep(self._bench.journal, folder)

    def offer(self) -> None:
        """Emit the offer of a session that was cut short, if there is one.

        For front ends that start without a model; the first load emits it otherwise. Call it before
        the first `run`.
        """
        offered = resume.offer(self._bench)
        if offered is not None:
            self._emit(offered)

    def remember_identities(self, file: Path) -> None:
        """Keep the fingerprints of checkpoints in `file`; call it before the first `run`."""
        self._bench.identities = file

    def forget(self) -> None:
        """Remove the kept session: the shell ends normally, so there is nothing to resume."""
        kept = self._bench.journal.forget()
        if kept is not None:
            resume.drop(kept)

    def serving(self) -> ServingReport | None:
        """What the server beside the front end does, None without one. Does not wait."""
        server = self._bench.server
        return None if server is None else server.snapshot()

    def served_by(self, server: Server) -> None:
        """`server` listens for `serve`'s service; the command `serve` controls it."""
        self._bench.server = server
        self._view = replace(self._view, serving=server.address)

    def serve(self, service: Service) -> None:
        """Let `service` answer requests with the resident model, between and beside commands."""
        self._service = service
        service.connect(self._worker.wake, self._emit)
        self._worker.attach(service)

    def run(self, line: str) -> int:
        """Queue a command line and return its job number; results arrive as events."""
        line = line.strip()
        try:
            parsed = registry.parse(line)
            if parsed.command.instant:
                report = parsed.command.handler(Call(self._bench, parsed.params, SILENT))
                return self._worker.answer(line, report, self._view.state)
        except MlxfunError as problem:
            return self._worker.answer(line, problem, self._view.state)
        return self._worker.submit(
            line,
            lambda ctx: self._perform(parsed, line, ctx),
            between=parsed.command.between,
            steady=parsed.command.steady,
        )

    def cancel(self, only: str | None = None) -> None:
        """Cancel the running job; a second call drops the queued ones too.

        only: cancel nothing unless it is this line that runs.
        """
        self._worker.cancel(only)

    def complete(self, line: str) -> list[Completion]:
        """The completions of `line`. Does not wait for the worker."""
        return completion.complete(line, self._view)

    def form(self, line: str) -> Form | None:
        """The form of a command line, None for one that has none."""
        return form.form_of(line)

    def filled_in(self, line: str, name: str, text: str) -> str:
        """`line` with another value for the parameter `name`. Raises UsageError."""
        return form.filled_in(line, name, text)

    def complete_field(self, line: str, name: str, text: str) -> list[Completion]:
        """The completions of one field of the form of `line`."""
        return form.completions(line, name, text, self._view)

    def help(self, name: str | None, width: int = registry.HELP_WIDTH) -> str:
        """A command's help page or a guide, the overview for None, or why there is no such page."""
        try:
            return self._help_text(name, width=width)
        except MlxfunError as problem:
            return str(problem)

    def view(self) -> SessionView:
        """The session after the last job; may be called from any thread."""
        return self._view

    def rows(self) -> tuple[Row, ...]:
        """Every command, with whether it applies to the session after the last job."""
        return registry.rows(self._view)

    def close(self, timeout: float = 5.0) -> None:
        """Cancel everything, close the session, and wait at most `timeout` seconds for that."""
        self._alive = not self._worker.close(timeout)
        if not self._alive:
            self._bench.journal.close()

    def _perform(self, parsed: Parsed, line: str, ctx: Context) -> Report:
        """Run a parsed line on the worker thread: journal, session, outcome for `expect`."""
        command, bench = parsed.command, self._bench
        if command.between and bench.journal.running:
            return self._perform_between(parsed, line, ctx)
        written = command.recorded and bench.journal.records(loads=command.name == "load")
        if written:
            self._tokens = 0
            bench.journal.begin(line)
        bench.name(line)
        try:
            report = command.handler(Call(bench, parsed.params, ctx))
        except BaseException as problem:
            if isinstance(problem, MlxfunError):
                problem.args = (brief(str(problem), *registry.split(line)),)
            if written:
                bench.journal.failed(brief(str(problem)))
            self._remember(command, None, str(problem))
            raise
        uses = ctx.reading().uses()
        report = replace(report, inputs=uses) if uses else report
        if bench.caveat:
            report = replace(report, caveat=bench.caveat)
        self._remember(command, report, None)
        self._write_down(command, report, written)
        return report

    def _perform_between(self, parsed: Parsed, line: str, ctx: Context) -> Report:
        """Run a line between two tokens of a recorded command; the journal gets it after that one."""
        # A step of the history that it makes has its own name, not that of the answer.
        with self._bench.named(line):
            report = parsed.command.handler(Call(self._bench, parsed.params, ctx))
        if parsed.command.recorded:
            self._bench.journal.after(line, self._tokens)
        return report

    def _remember(self, command: Command, report: Report | None, error: str | None) -> None:
        """Keep the outcome for `expect`, except that of commands which do not count for it."""
        if command.name not in ("expect", "replay", "record", "set"):
            self._bench.last, self._bench.last_error = report, error
        if isinstance(report, ChatReport) and report.finish_reason != "cancelled":
            self._bench.answers.append(report)

    def _write_down(self, command: Command, report: Report, written: bool) -> None:
        bench = self._bench
        mark = bench.mark if bench.loaded else None
        if written and isinstance(report, ChatReport) and report.finish_reason == "cancelled":
            bench.journal.failed("the answer was cancelled", mark, cancelled=True)
        elif written:
            bench.journal.done(mark, _note(report))
            if command.name == "collect":
                self._remember_statistics()
        elif command.name == "load" and bench.loaded is not None:
            bench.journal.loaded(bench.loaded)

    def _remember_statistics(self) -> None:
        try:
            resume.remember_statistics(self._bench)
        except (MlxfunError, OSError) as problem:
            # Only a crash would need them: the calibration itself has succeeded.
            log.warning("statistics are not kept: %s", problem)

    def _nested(self, line: str, parent: Context, due: list[During] | None = None) -> JobEnded:
        """Run a line inside the running job, on the worker thread (replays and recipes).

        due: what runs between its tokens; what has run is taken out.
        """
        parsed = registry.parse(line)

        def work(ctx: Context) -> Report:
            inside = Interleaved(ctx, due, lambda one: self._nested(one, ctx)) if due else ctx
            return self._perform(parsed, line, inside)

        return self._worker.nested(line, work, parent)

    def _refresh(self) -> str:
        """Renew `view` before each `JobEnded`, so that listeners see the state after the job."""
        self._view = self._bench.view()
        if self._service is not None:
            self._service.refresh(self._bench.session if self._bench.loaded else None)
        return self._view.state

    def _emit(self, event: Event) -> None:
        if isinstance(event, Token):
            self._tokens += 1
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                # Thread boundary: a broken listener must not fail the job, or starve the others.
                log.exception("a listener failed on %s", type(event).__name__)


def _note(report: Report) -> str:
    """A comment for the session file where a replay may differ: after a cancelled calibration."""
    if isinstance(report, CollectReport) and report.cancelled:
        return (
            f"cancelled after {report.samples} of {report.samples_planned} samples: a replay "
            "collects them all, so that later states may differ"
        )
    return ""
