"""Crash recovery: keeps the running session on disk, and restores it with `resume`.

The screen and the line shell keep their journal in the user's state directory and remove it when
they end as they should. A file that is left, and that no process holds locked, is of a session
that was killed. Bringing it back runs its commands again and compares every state, but reads the
statistics that a calibration had made instead of calibrating again, and leaves alone the files
that it wrote.
"""

from __future__ import annotations

import fcntl
import glob
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from commands.scripts.replay import ReplayError, ScriptRun, checked_script
from commands.workbench.journal import Journal
from commands.workbench.session_file import EmptyScript, Entry, Mark, read_script
from commands.workbench.workbench import Workbench
from mlxfun.context import Context
from mlxfun.errors import StateError, UsageError
from mlxfun.events import Notice
from mlxfun.report import Report
from mlxfun.text import counted, cut, shown

SUFFIX = ".mlxfun"
SHOWN = 5  # names of kept sessions in a message


@dataclass(frozen=True, slots=True)
class ResumeReport(Report):
    """A resumed session.

    commands: how many ran again. passed: how many were skipped, since they leave the session as it
    is; skipped: their names, each once. cut: the command that was running when the session was
    killed, and is not repeated.
    """

    kind: ClassVar[str] = "resume"
    commands: int
    passed: int
    cut: str | None
    skipped: tuple[str, ...] = ()

    def summary(self) -> str:
        ran = counted(self.commands, "command was", "commands were")
        text = f"the session is back: {ran} run again"
        if self.passed:
            text += (
                f"; not repeated, since they change neither model nor statistics: {self._skipped}"
            )
        if self.cut:
            text += f'; "{cut(self.cut)}" was running when the session ended, and was not repeated'
        return text

    @property
    def _skipped(self) -> str:
        names = ", ".join(self.skipped[:SHOWN])
        more = ", ..." if len(self.skipped) > SHOWN else ""
        return f"{counted(self.passed, 'command', 'commands')} ({names}{more})"


@dataclass(frozen=True, slots=True)
class Found:
    """A session that was cut short. name: what `resume --drop` calls it; date: "30 Nov 14:02".

    directory: where it ran, None if it ran here, so that it can be resumed here.
    """

    name: str
    date: str
    model: str
    commands: int
    directory: str | None


def default_folder() -> Path:
    """The directory of kept sessions on this system."""
    from platformdirs import user_state_path

    return user_state_path("mlxfun") / "sessions"


def keep(journal: Journal, folder: Path) -> None:
    """Keep the running session in `folder`. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    journal.keep(folder / f"{stamp}-{os.getpid()}{SUFFIX}")


def remember_statistics(bench: Workbench) -> None:
    """Write the statistics of the calibration that has just ended beside the kept session.

    Raises MlxfunError or OSError.
    """
    kept = bench.journal.kept
    if kept is not None:
        bench.session.save_stats(_statistics(kept, bench.journal.commands))


def _statistics(kept: Path, number: int) -> Path:
    return kept.with_suffix(f".{number}.npz")


def drop(path: Path) -> None:
    """Remove a kept session and the statistics beside it."""
    for beside in path.parent.glob(f"{glob.escape(path.stem)}.*.npz"):
        beside.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def forget(bench: Workbench, name: str | None) -> Path:
    """Remove the kept session called `name`, by default the newest that was cut short.

    Only files that lie in the directory of kept sessions and that no process runs are removed.
    Raises StateError for any other name.
    """
    if name is None:
        path = newest(bench.sessions)
    else:
        folder = bench.sessions
        known = {path.stem: path for path in left(folder)} if folder is not None else {}
        path_of = known.get(name.removesuffix(SUFFIX))
        if path_of is None:
            names = ", ".join(list(known)[:SHOWN]) or "none"
            raise StateError(
                f"resume --drop: no kept session is called {shown(name)}; it takes the name of a "
                f"session that was cut short: {names}"
            )
        path = path_of
    drop(path)
    return path


def left(folder: Path) -> list[Path]:
    """Kept sessions in `folder` that no process runs, the newest first, readable or not."""
    there = sorted(folder.glob(f"*{SUFFIX}"), reverse=True)
    return [path for path in there if path.is_file() and not _in_use(path)]


def cut_short(folder: Path) -> list[Path]:
    """The sessions of `left` that can be resumed; those killed before a command are removed."""
    some = []
    for path in left(folder):
        try:
            read_script(path, kept=True)
        except EmptyScript:
            drop(path)
        except UsageError:
            continue  # damaged, or of a newer version: not ours to remove
        else:
            some.append(path)
    return some


def _in_use(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # locked by the process that runs it, or removed by now
        return True
    return False


def found(bench: Workbench) -> Found | None:
    """The session to offer: the newest that was cut short, first of those that ran here.

    Given once; None from then on, and where sessions are not kept.
    """
    offering, bench.offer_resume = bench.offer_resume, False
    if not offering or bench.sessions is None:
        return None
    some = [_described(path) for path in cut_short(bench.sessions)]
    return next((one for one in some if one.directory is None), some[0] if some else None)


def _described(path: Path) -> Found:
    script = read_script(path, kept=True)
    try:
        date = time.strftime("%d %b %H:%M", time.strptime(path.stem[:15], "%Y%m%d-%H%M%S"))
    except ValueError:
        date = path.stem  # renamed by hand
    where = script.header.get("directory")
    elsewhere = where if where is not None and Path(where) != Path.cwd() else None
    model = script.header.get("model", "no model")
    return Found(path.stem, date, model, len(script.entries), elsewhere)


def offer(bench: Workbench) -> Notice | None:
    """The offer of the session that can be resumed, once; None if there is none."""
    session = found(bench)
    if session is None:
        return None
    commands = counted(session.commands, "command", "commands")
    text = f"a session of {session.date} on {session.model} was cut short after {commands}"
    about = session.model
    if session.directory is not None:
        text += f": start mlxfun-shell --resume in {session.directory} to resume it"
        return Notice("offer", text, about=about)
    return Notice("offer", f"{text} (`resume --drop` deletes it)", "resume", about)


def resume(bench: Workbench, path: Path | None, ctx: Context) -> ResumeReport:
    """Restore the session at `path`, by default the newest that was cut short."""
    path = path or newest(bench.sessions)
    bench.offer_resume = False
    script, commands = checked_script(path, bench.wiring.command_of, kept=True)
    where = script.header.get("directory")
    if where is not None and Path(where) != Path.cwd():
        raise StateError(f"that session ran in {where}: start mlxfun-shell there to resume it")
    try:
        report = _ResumeRun(bench, script, commands, keep_going=False).resume(ctx)
    finally:
        bench.recorded_name = str
    if bench.sessions is not None and path in left(bench.sessions):
        drop(path)
    return report


def newest(folder: Path | None) -> Path:
    """The newest session that was cut short, first of those that ran here.

    Raises StateError if there is none.
    """
    some = cut_short(folder) if folder is not None else []
    if not some:
        raise StateError("no session was cut short: there is nothing to resume")
    return next((path for path in some if _described(path).directory is None), some[0])


class _ResumeRun(ScriptRun):
    """Runs a session file again for the state of the session, without writing its files."""

    def resume(self, ctx: Context) -> ResumeReport:
        """Run all entries except those that only wrote files and the one that was cut short."""
        entries, cut = self.script.entries, None
        if entries[-1].mark is None and "model" in self.script.header:
            entries, cut = entries[:-1], entries[-1].line
        self.prepare(ctx)
        skipped = []
        for position, entry in enumerate(entries):
            ctx.check()
            self.tell(position, ctx)
            if self.commands[position].read_only:
                skipped.append(self.commands[position].name)
                continue
            self._one(position, entry, ctx)
        names = tuple(dict.fromkeys(skipped))
        return ResumeReport(len(entries) - len(skipped), len(skipped), cut, names)

    def prepare(self, ctx: Context) -> None:
        """As for a replay, but another model on which nothing was done is replaced."""
        bench, wanted = self.bench, self.script.header.get("checkpoint")
        loaded = bench.loaded
        untouched = loaded is not None and bench.mark == Mark(loaded.state)
        if loaded is not None and wanted is not None and untouched:
            known = loaded.checkpoint == wanted or bench.session.recognises(wanted)
            if not known:
                bench.close()
        super().prepare(ctx)

    def _one(self, position: int, entry: Entry, ctx: Context) -> None:
        statistics = _statistics(self.script.path, position + 1)
        known = self.commands[position].name == "collect" and statistics.is_file()
        self.bench.kept_statistics = statistics if known else None
        try:
            self.step(position, entry, ctx)
        except ReplayError as problem:
            raise ReplayError(
                f"{problem}; the session is at the state before that, and its file is still there"
            ) from None
        finally:
            self.bench.kept_statistics = None
