"""Prints the engine's events as they arrive; used by the headless runner and the line shell."""

from __future__ import annotations

import sys
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TextIO, cast

from commands import streams
from commands.output.progress import ProgressLines
from mlxfun.events import Event, JobEnded, JobStarted, Notice, Progress, Token
from mlxfun.generation.reports import ChatReport
from mlxfun.text import one_line, visible

if TYPE_CHECKING:
    from commands.engine import Engine


class EventPrinter:
    """Prints results on `out` and everything else on `err`.

    as_json: one JSON object per command. stream: chat is printed token by token.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        as_json: bool = False,
        stream: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.as_json = as_json
        self.stream = stream
        self.out = cast(TextIO, streams.Results(out or sys.stdout))
        self.err = cast(TextIO, streams.Messages(err or sys.stderr))
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._progress = ProgressLines(self.err)
        self._streamed: set[int] = set()
        self._interleaved: set[int] = set()  # jobs with two answers at once, printed when complete
        self._ended = 0
        engine.subscribe(self._events.put)

    def follow(self, job: int) -> JobEnded:
        """Print events until `job` ends."""
        while True:
            ended = self._next(job, None)
            if ended is not None:
                return ended

    def follow_briefly(self, job: int, seconds: float) -> None:
        """Print events until `job` ends, but no longer than that."""
        deadline = time.monotonic() + seconds
        # An interrupt may come between taking an event and printing it: the end is not repeated.
        while self._ended != job and (left := deadline - time.monotonic()) > 0:
            try:
                if self._next(job, left) is not None:
                    return
            except Empty:
                return

    def _next(self, job: int, timeout: float | None) -> JobEnded | None:
        """Print one event; the event if it ends `job`, else None. Raises Empty after `timeout`."""
        event = self._events.get(timeout=timeout)
        if isinstance(event, JobEnded):
            self._ended = event.job
        self._print(event, job)
        return event if isinstance(event, JobEnded) and event.job == job else None

    def _print(self, event: Event, followed: int) -> None:
        if isinstance(event, Token):
            self._progress.end()
        if isinstance(event, JobStarted) and event.line.split(None, 1)[:1] == ["ab"]:
            self._interleaved.add(event.job)
        match event:
            case Progress():
                self._progress.show(event)
            case Notice():
                self._progress.end()
                way = f": type {event.line}" if event.line else ""
                self.say(f"{event.level}: {event.text}{way}")
            case JobStarted() if not self.as_json and not (self.stream and event.job == followed):
                self.heading(event.line)
            case Token() if self.stream and event.job not in self._interleaved:
                self._token(event)
            case JobEnded():
                self._progress.end()
                self.show(event)
            case _:
                pass  # queued jobs and routing frames have nothing to read

    def heading(self, line: str) -> None:
        """Print a command line that was not typed at the prompt."""
        from commands.output.console import print_dim

        print_dim(f"> {line}", self.out)

    def _token(self, token: Token) -> None:
        self._streamed.add(token.job)
        self.out.write(visible(token.text))
        self.out.flush()

    def show(self, ended: JobEnded) -> None:
        """Print the outcome of a command."""
        if self.as_json:
            from commands.output.as_json import json_line

            self.out.write(json_line(ended) + "\n")
            self.out.flush()
        elif ended.report is not None:
            self._report(ended)
        if ended.error is not None:
            self.say(f"error: {ended.error}")

    def _report(self, ended: JobEnded) -> None:
        from commands.output.console import print_dim, print_report

        if ended.report is None:
            return
        if isinstance(ended.report, ChatReport) and ended.job in self._streamed:
            self._streamed.discard(ended.job)
            self.out.write("\n")
            print_dim(ended.report.summary(), self.out)
        else:
            print_report(ended.report, self.out)

    def say(self, sentence: str) -> None:
        """Print a sentence on `err`."""
        self.err.write(one_line(sentence) + "\n")
        self.err.flush()
