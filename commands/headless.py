"""Runs a list of command lines without a screen: results on stdout, progress on stderr.

Exit codes: 0, 1 (a command failed), 2 (usage), 128 + signal number after an interrupt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TextIO

from commands import registry
from commands.progress import ProgressLines
from commands.replay import expects_error
from mlxfun.errors import UsageError
from mlxfun.events import Event, JobEnded, Notice, Progress

if TYPE_CHECKING:
    from commands.engine import Engine

OK, FAILED, USAGE = 0, 1, 2


@dataclass(slots=True)
class _Outcome:
    """The worst exit code so far, and whether to go on."""

    code: int = OK
    stop: bool = False


class Headless:
    """A listener that runs lines one after the other and prints what each gives."""

    def __init__(
        self,
        engine: Engine,
        *,
        as_json: bool,
        keep_going: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.engine = engine
        self.as_json = as_json
        self.keep_going = keep_going
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._progress = ProgressLines(self.err)
        engine.subscribe(self._events.put)

    def run(self, lines: Sequence[str]) -> int:
        """Run `lines`; all are parsed first, so that a typo at the end costs no calibration."""
        for line in lines:
            try:
                registry.parse(line)
            except UsageError as problem:
                self._show(JobEnded(0, line, None, str(problem), 0.0, "", usage=True))
                return USAGE
        outcome = _Outcome()
        for position, line in enumerate(lines):
            following = lines[position + 1 : position + 2]
            ended = self.wait(self.engine.run(line))
            if ended.error is not None and not any(map(expects_error, following)):
                outcome.code = outcome.code or (USAGE if ended.usage else FAILED)
                outcome.stop = not self.keep_going
            if ended.report is not None and ended.report.kind == "quit":
                outcome.stop = True
            if outcome.stop:
                break
        return outcome.code

    def wait(self, job: int) -> JobEnded:
        """Show events until `job` ends."""
        while True:
            event = self._events.get()
            if isinstance(event, JobEnded):
                self._progress.end()
                self._show(event)
                if event.job == job:
                    return event
            elif isinstance(event, Progress):
                self._progress.show(event)
            elif isinstance(event, Notice):
                self._progress.end()
                self._say(f"{event.level}: {event.text}")

    def _show(self, ended: JobEnded) -> None:
        if self.as_json:
            from commands.render import report_json

            self.out.write(json.dumps(report_json(ended), allow_nan=False) + "\n")
            self.out.flush()
        if ended.error is not None:
            self._say(f"error: {ended.line}: {ended.error}")
        elif ended.report is not None and not self.as_json:
            from commands.console import print_report

            print_report(ended.report, self.out)

    def _say(self, text: str) -> None:
        from commands.render import safe

        self.err.write(safe(text) + "\n")
        self.err.flush()
