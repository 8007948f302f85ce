"""The worker thread, the only one that may touch MLX.

Lazy MLX arrays belong to the thread that made them, so loading, forward passes, edits and freeing
all happen here. Jobs come in through a queue; what leaves is `mlxfun.events`, handed to one `emit`
callable. Listeners post what they receive to their own thread; the worker never waits for them.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from mlxfun.context import Context, as_running
from mlxfun.errors import Cancelled, MlxfunError, UsageError
from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Progress,
    ResidencyFrame,
    RoutingFrame,
    Token,
)
from mlxfun.report import Report
from mlxfun.tally import Tally
from mlxfun.text import brief, cut

log = logging.getLogger(__name__)

Emit = Callable[[Event], None]
Work = Callable[[Context], Report]

OS_THREAD_SECONDS = 0.05
PROGRESS_SECONDS = 1 / 15  # faster than that no eye follows and a slow terminal chokes


class Background(Protocol):
    """Work that goes on between jobs, in steps: requests to the model. Called on the worker thread;
    none of it raises, except where it says so."""

    def step(self, borrowed: bool) -> bool:
        """Take a step; whether there is more to do. borrowed: between two tokens of a job."""

    def settle(self, ctx: Context) -> None:
        """A job that may change the model is about to run: bring what goes on to an end. Raises
        Cancelled when the job is cancelled meanwhile."""

    def close(self) -> None:
        """The worker ends."""


@dataclass(slots=True, eq=False)
class _Job:
    id: int
    line: str
    work: Work
    between: bool = False  # may run between two tokens of the job before it
    steady: bool = False  # leaves the model as it is
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Wake:
    """In the inbox: the background has something to do."""


class JobContext(Context):
    """The context of one job: stamps its number on events, throttles progress, notices a cancel."""

    def __init__(
        self,
        job: int,
        cancelled: threading.Event,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._between = between
        self.job = job
        self.cancelled = cancelled
        self._emit = emit
        self._clock = clock
        self._label: str | None = None
        self._began = 0.0
        self._sent = 0.0
        self._held: Progress | None = None
        self._tally = Tally()

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        """Send at most 15 a second, but always the first and the last of a label."""
        now = self._clock()
        first = label != self._label
        if first:
            self.flush()
            self._label, self._began = label, now
        self._held = Progress(self.job, label, done, total, unit, now - self._began)
        if first or done == total or now - self._sent >= PROGRESS_SECONDS:
            self._sent = now
            self.flush()

    def flush(self) -> None:
        """Send the progress that was held back, if any."""
        if self._held is not None:
            held, self._held = self._held, None
            self._emit(held)

    def emit(self, event: Event) -> None:
        """Pass `event` on. The engine does not know job numbers, so they are filled in here."""
        if isinstance(event, Token):
            # It ends the step: nothing of that may come later, and the next begins anew.
            self.flush()
            self._label = None
        if (
            isinstance(event, RoutingFrame | ResidencyFrame | Token | Progress)
            and event.job != self.job
        ):
            event = replace(event, job=self.job)
        self._emit(event)

    def check(self) -> None:
        """Raise `Cancelled` once the job was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled")

    def reading(self) -> Tally:
        """The one tally of the job."""
        return self._tally

    def interlude(self) -> None:
        """Run the jobs that wait first in line and may run between two tokens."""
        self._between()


class Worker:
    """A daemon thread that runs jobs one after the other.

    emit: receives every event. `JobQueued`, and the `JobEnded` of a job that never started, come on
    the caller's thread (a busy worker could not send them in time); all others on the worker's.
    after: called on the worker thread when a job is over and before its `JobEnded`; returns the
    model's state for that event. finish: called once on the worker thread before it ends.
    """

    def __init__(
        self,
        emit: Emit,
        after: Callable[[], str] = lambda: "",
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._emit = emit
        self._after = after
        self._finish = finish
        self._ids = itertools.count(1)
        self._inbox: SimpleQueue[_Job | _Wake | None] = SimpleQueue()
        self._background: Background | None = None
        self._lock = threading.Lock()  # guards _running, _waiting and _closed
        self._running: _Job | None = None
        self._waiting: list[_Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="mlxfun-worker", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> str | None:
        """The line of the running job."""
        running = self._running
        return running.line if running else None

    @property
    def queue(self) -> tuple[str, ...]:
        """The lines that wait, first one next."""
        with self._lock:
            return tuple(job.line for job in self._waiting if not job.cancelled.is_set())

    def attach(self, background: Background) -> None:
        """Let `background` take steps while no job runs, and between the tokens of those that do."""
        self._background = background
        self.wake()

    def wake(self) -> None:
        """The background has something to do. May be called from any thread."""
        self._inbox.put(_Wake())

    def submit(self, line: str, work: Work, *, between: bool = False, steady: bool = False) -> int:
        """Queue a job and return its number; never blocks.

        between: it may run inside the running job, between two tokens, unless another job waits
        before it: what was asked for first is done first. steady: it leaves weights and steering as
        they are, so that the background need not be settled before it.
        """
        job = _Job(next(self._ids), line, work, between, steady)
        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.append(job)
        if closed:
            return self._refuse(job, UsageError("the session is closing: nothing new is started"))
        self._emit(JobQueued(job.id, line))
        self._inbox.put(job)
        return job.id

    def answer(self, line: str, outcome: Report | MlxfunError, state: str) -> int:
        """A job that needs no worker: its `JobEnded` is emitted at once, on this thread."""
        job = next(self._ids)
        if isinstance(outcome, Report):
            self._emit(JobEnded(job, line, outcome, None, 0.0, state))
        else:
            self._emit(_failure(job, line, outcome, 0.0, state))
        return job

    def nested(self, line: str, work: Work, parent: Context) -> JobEnded:
        """Run a job inside the running one (a line of a replay): its own events, one cancel.

        Only for the worker thread.
        """
        cancelled = parent.cancelled if isinstance(parent, JobContext) else threading.Event()
        # The job it is part of has settled the background, but a line before this one may have let
        # it take steps again.
        return self._run(_Job(next(self._ids), line, work, cancelled=cancelled))

    def cancel(self, only: str | None = None) -> None:
        """Cancel the running job, or the next one if none runs yet; a second call drops the rest.

        only: leave everything alone unless that job is this line: it may just have ended. The
        worker finishes the layer, batch or token in hand first.
        """
        with self._lock:
            target = self._running or next(iter(self._waiting), None)
            if target is None or (only is not None and target.line != only):
                return
            if target.cancelled.is_set():
                for job in self._waiting:
                    job.cancelled.set()
            target.cancelled.set()

    def close(self, timeout: float = 5.0) -> bool:
        """Cancel everything and wait up to `timeout` seconds; False if the thread still runs."""
        with self._lock:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancelled.set()
        self._inbox.put(None)
        deadline = time.monotonic() + timeout
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        _wait_for_os_thread(self._thread.native_id, deadline)
        return True

    def _refuse(self, job: _Job, error: MlxfunError) -> int:
        self._emit(_failure(job.id, job.line, error, 0.0, ""))
        return job.id

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            with self._lock:
                if job not in self._waiting:
                    continue  # it ran between two tokens of an earlier job
                self._waiting.remove(job)
                self._running = job
            # Cleared before the event goes out, so that a listener who asks finds the worker free.
            self._run(job, before_end=self._idle)
        with self._lock:
            late, self._waiting = self._waiting, []
        for job in late:  # accepted while the sentinel was on its way
            self._emit(_failure(job.id, job.line, Cancelled("cancelled"), 0.0, ""))
        try:
            if self._background is not None:
                self._background.close()
            self._finish()
        except Exception:
            # Thread boundary: nobody is left to tell, and the process is ending anyway.
            log.exception("closing the session failed")
        _release_streams()

    def _next(self) -> _Job | None:
        """The next job, None to end. Until there is one the background takes its steps."""
        while True:
            more = self._background is not None and self._background.step(borrowed=False)
            try:
                found = self._inbox.get(block=not more)
            except Empty:
                continue
            if not isinstance(found, _Wake):
                return found

    def _between(self) -> None:
        """Run the first waiting jobs inside the running one, as long as they may; then the
        background takes a step."""
        while True:
            with self._lock:
                job = self._waiting[0] if self._waiting else None
                if job is None or not job.between:
                    break
                self._waiting.pop(0)
            self._run(job)
        if self._background is not None:
            self._background.step(borrowed=True)

    def _idle(self) -> None:
        with self._lock:
            self._running = None

    def _run(self, job: _Job, before_end: Callable[[], None] = lambda: None) -> JobEnded:
        began = time.monotonic()
        context = JobContext(job.id, job.cancelled, self._emit, between=self._between)
        report: Report | None = None
        error: BaseException | None = None
        state = ""
        try:
            try:
                context.check()
                self._emit(JobStarted(job.id, job.line))
                with as_running(context):
                    if self._background is not None and not job.steady:
                        self._background.settle(context)
                    report = job.work(context)
            finally:
                context.flush()
                state = self._after()
        except BaseException as problem:  # noqa: BLE001
            # Thread boundary: whatever a job raises, SystemExit of a library included, becomes an
            # event; a dead worker would leave every later command waiting for ever.
            error = problem
        seconds = time.monotonic() - began
        if error is not None:
            ended = _failure(job.id, job.line, error, seconds, state)
        else:
            ended = JobEnded(job.id, job.line, report, None, seconds, state)
        before_end()
        self._emit(ended)
        return ended


def _wait_for_os_thread(native_id: int | None, deadline: float) -> None:
    """Wait until the operating system has done away with a thread that Python has joined.

    MLX keeps streams, threads of their own, in thread-local storage, and `clear_streams` does not
    reach the thread-local ones of mlx-lm. They are torn down after `Thread.join` (before Python
    3.13) has returned; a process that exits meanwhile is aborted.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        time.sleep(OS_THREAD_SECONDS)  # macOS: there is nothing to look at
        return
    task = tasks / str(native_id)
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.001)


def _failure(job: int, line: str, error: BaseException, seconds: float, state: str) -> JobEnded:
    """The event for a job that raised `error`."""
    if isinstance(error, MlxfunError):
        text = brief(str(error))
    elif isinstance(error, OSError) and error.strerror:
        # The file system's word on something that the user named; no fault of the program.
        named = f"{cut(str(error.filename))}: " if error.filename is not None else ""
        text = f"{named}{error.strerror}"
    else:
        log.debug("job %d (%s) raised", job, line, exc_info=error)
        text = f"unexpected {type(error).__name__}: {error}" if str(error) else repr(error)
        text = brief(text)
    return JobEnded(
        job,
        line,
        None,
        text,
        seconds,
        state,
        cancelled=isinstance(error, Cancelled),
        usage=isinstance(error, UsageError),
    )


def _release_streams() -> None:
    """Let MLX end this thread's streams.

    Without it a process that exits at once dies in most cases with "terminate called without an
    active exception"; `_wait_for_os_thread` is for the rest. Looked up instead of imported, since
    a session that never loaded a model has no MLX.
    """
    core = sys.modules.get("mlx.core")
    if core is not None:
        core.clear_streams()
