"""Runs a list of command lines without a screen: results on stdout, progress on stderr.

Exit codes: 0, 1 (a command failed), 2 (usage), 128 + signal number after an interrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commands import registry
from commands.runners.event_printer import EventPrinter
from commands.scripts.replay import checked_script, expects_error
from mlxfun.errors import UsageError
from mlxfun.events import JobEnded

if TYPE_CHECKING:
    from commands.engine import Engine

OK, FAILED, USAGE = 0, 1, 2
GRACE_SECONDS = 5.0


def check(lines: Sequence[str]) -> JobEnded | None:
    """The first invalid line, as the job that it would end as; None if all lines are valid.

    Checked before anything runs: a typo at the end must not cost a calibration.
    """
    for line in lines:
        try:
            parsed = registry.parse(line)
            if parsed.command.name == "replay":
                checked_script(Path(parsed.params["path"]), registry.meant)
        except UsageError as problem:
            return JobEnded(0, line, None, str(problem), 0.0, "", usage=True)
    return None


def run_lines(
    engine: Engine, printer: EventPrinter, lines: Sequence[str], keep_going: bool = False
) -> int:
    """Run `lines` in order and return the exit code; the first failure stops, unless told not to.

    A failure that the next line expects (`expect error ...`) is none.
    """
    code = OK
    for position, line in enumerate(lines):
        ended = _run_one(engine, printer, line)
        following = lines[position + 1 : position + 2]
        if ended.error is not None and not any(map(expects_error, following)):
            code = code or (USAGE if ended.usage else FAILED)
            if not keep_going:
                break
        if ended.report is not None and ended.report.kind == "quit":
            break
    return code


def _run_one(engine: Engine, printer: EventPrinter, line: str) -> JobEnded:
    job = engine.run(line)
    try:
        return printer.follow(job)
    except KeyboardInterrupt:
        engine.cancel()
        engine.cancel()
        # The job ends between two layers or batches, cleans up, and has its line on stdout.
        printer.follow_briefly(job, GRACE_SECONDS)
        raise
