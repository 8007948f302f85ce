"""Replays a session file; stops at the first command whose state differs from the recorded one."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from commands.workbench.files import Files
from commands.workbench.interleave import During
from commands.workbench.session_file import Entry, Mark, Script, read_script
from commands.workbench.wiring import Declared
from commands.workbench.workbench import Workbench
from mlxfun.context import SILENT, Context
from mlxfun.errors import Cancelled, MlxfunError, StateError, UsageError
from mlxfun.events import JobEnded, Notice
from mlxfun.report import Report
from mlxfun.text import counted, cut, shown


class ReplayError(MlxfunError):
    """A replay that differs from its recording; the message names file and line."""


@dataclass(frozen=True, slots=True)
class ReplayReport(Report):
    """A replay. compared: states that were equal; failures: commands that failed, with keep_going.

    output_root: the directory its saves went to.
    """

    kind: ClassVar[str] = "replay"
    script: str
    commands: int
    compared: int
    expectations: int
    failures: tuple[str, ...]
    output_root: str

    def summary(self) -> str:
        return (
            f"replayed {self.script}: {counted(self.commands, 'command', 'commands')}, "
            f"{counted(self.compared, 'state', 'states')} as recorded, "
            f"{self.expectations} expectations met; output under {self.output_root}"
        )


def run_script(bench: Workbench, path: Path, keep_going: bool, ctx: Context) -> ReplayReport:
    """Run the session file at `path` as nested jobs of the running one."""
    if bench.files.script is not None:
        raise UsageError(f"a replay cannot start another one: {path}")
    path = bench.readable(path)
    if bench.journal.path is not None and path.resolve() == bench.journal.path.resolve():
        raise UsageError(f"{path} is being recorded to: it cannot be replayed at the same time")
    script, found = checked_script(path, bench.wiring.command_of)
    before = bench.files
    root = before.root or Path(tempfile.mkdtemp(prefix="mlxfun-replay-"))
    bench.files = Files(root, path.resolve().parent)
    ctx.emit(Notice("info", f"replaying {script.path}; what it saves goes below {root}"))
    try:
        return ScriptRun(bench, script, found, keep_going).run(ctx)
    finally:
        bench.files, bench.recorded_name = before, str
        if before.root is None:
            with suppress(OSError):  # not empty: something was saved there, which stays
                root.rmdir()


def checked_script(
    path: Path, command_of: Callable[[str], Declared], kept: bool = False
) -> tuple[Script, list[Declared]]:
    """The script at `path` and the command of each of its entries. kept: see `read_script`.

    Raises UsageError with file and line, before anything has run.
    """
    script = read_script(path, kept)
    found = []
    for entry in script.entries:
        try:
            found.append(command_of(entry.line))
        except UsageError as problem:
            raise UsageError(f"{script.where(entry)}: {problem}") from None
        if found[-1].name == "replay":
            raise UsageError(f"{script.where(entry)}: a replay cannot start another one")
        if found[-1].name == "resume":  # it reads and removes files of this user's sessions
            raise UsageError(f"{script.where(entry)}: resume cannot be part of a session file")
    return script, found


class ScriptRun:
    """One run of a script, comparing the state after each command with the recorded one.

    commands: that of each entry, as `checked_script` gives them.
    """

    def __init__(
        self, bench: Workbench, script: Script, commands: list[Declared], keep_going: bool
    ) -> None:
        self.bench = bench
        self.script = script
        self.commands = commands
        self.keep_going = keep_going
        self.compared = 0
        self.expectations = 0
        self.failures: list[str] = []
        self._met: set[int] = set()  # entries that ran in the middle of the answer before them

    def run(self, ctx: Context) -> ReplayReport:
        """Run all entries in order."""
        if self.script.format > 1 or not self.bench.settings.undo_steering:
            return self._run(ctx)
        # As `set` lines, so that a recording of this session replays the same way.
        self._must(self._nested("set undo-steering off", ctx), "format 1")
        try:
            return self._run(ctx)
        finally:
            self._nested("set undo-steering on", SILENT)

    def _run(self, ctx: Context) -> ReplayReport:
        self.prepare(ctx)
        done = 0
        for position, entry in enumerate(self.script.entries):
            ctx.check()
            if self.commands[position].name == "quit":
                break
            self.tell(position, ctx)
            self.step(position, entry, ctx)
            done += 1
        report = ReplayReport(
            str(self.script.path),
            done,
            self.compared,
            self.expectations,
            tuple(self.failures),
            str(self.bench.files.root),
        )
        if self.failures:
            raise ReplayError(
                f"{len(self.failures)} of {done} commands failed, the first at {self.failures[0]}"
            )
        return report

    def tell(self, position: int, ctx: Context) -> None:
        """Report which command runs now."""
        # Without a total: commands take a second or an hour, so a share of them says nothing.
        ctx.progress(f"command {position + 1} of {len(self.script.entries)}", 0)

    def prepare(self, ctx: Context) -> None:
        """Set seed and model as in the header. Raises StateError or ReplayError if impossible."""
        header, bench = self.script.header, self.bench
        self._warn_of_versions(ctx)
        if self.script.seed is not None and self.script.seed != bench.settings.seed:
            if bench.loaded is None:
                bench.settings = replace(bench.settings, seed=self.script.seed)
            else:
                self._must(self._nested(f"set seed {self.script.seed}", ctx), "the header's seed")
        source = header.get("model")
        if source is None:
            return
        if bench.loaded is None:
            words = ["load", source]
            if "revision" in header:
                words += ["--revision", header["revision"]]
            if "chat-template" in header:
                words += ["--chat-template", header["chat-template"]]
            words += shlex.split(header.get("residency", ""))
            self._must(self._nested(shlex.join(words), ctx), f"the model {source} of the header")
        self._check_checkpoint(source, header.get("checkpoint"), ctx)

    def _check_checkpoint(self, source: str, wanted: str | None, ctx: Context) -> None:
        loaded = self.bench.loaded
        if wanted is None or loaded is None:
            return
        if loaded.checkpoint != wanted and self.bench.session.recognises(wanted):
            self.bench.recorded_name = self._earlier_name
            text = (
                f"{self.script.path} was made with the identity of an earlier version: its states "
                "are compared by the names that they had then"
            )
            ctx.emit(Notice("info", text))
        elif loaded.checkpoint != wanted:
            raise StateError(
                f"{self.script.path} was recorded on {source} (checkpoint {wanted}), the resident "
                f"model is {loaded.source} (checkpoint {loaded.checkpoint}): load {source}"
            )
        mark = self.bench.mark
        if mark != Mark(loaded.state):
            raise StateError(
                f"{self.script.path} begins at the model as loaded ({loaded.state}), the resident "
                f"one is at {mark}: discard what is staged and go to node 0, or load it again"
            )

    def _earlier_name(self, state: str) -> str:
        # Of the model that is resident then: the script may load another, or lose one.
        return self.bench.session.earlier_state(state) if self.bench.loaded else state

    def _warn_of_versions(self, ctx: Context) -> None:
        for name, here in self.bench.journal.versions.items():
            there = self.script.header.get(name, here)
            if there != here:
                text = f"{self.script.path} was recorded with {name} {there}, this is {here}"
                ctx.emit(Notice("warning", text))

    def step(self, position: int, entry: Entry, ctx: Context) -> None:
        """Run one entry and compare its state. Raises ReplayError unless `keep_going`."""
        if position in self._met:
            self._compare(entry)
            return
        if entry.during is not None and position:
            ctx.emit(Notice("warning", self._too_short(entry)))
        ended = self._with_interludes(position, entry, ctx)
        following = self.script.entries[position + 1 : position + 2]
        tolerated = any(expects_error(e.line) for e in following)
        if ended.error is not None and not tolerated:
            text = f"{self.script.where(entry)}: {cut(entry.line)}: {ended.error}"
            if not self.keep_going:
                raise ReplayError(text)
            self.failures.append(text)
        elif self.commands[position].name == "expect":
            self.expectations += 1
        self._compare(entry)

    def _with_interludes(self, position: int, entry: Entry, ctx: Context) -> JobEnded:
        """Run one entry, and in the middle of it those that were recorded there."""
        due = []
        for later in self.script.entries[position + 1 :]:
            if later.during is None:
                break
            due.append(During(later.during, later.line))
        count = len(due)
        ended = self._nested(entry.line, ctx, due)
        self._met.update(range(position + 1, position + 1 + count - len(due)))
        return ended

    def _too_short(self, entry: Entry) -> str:
        """Why a line runs behind the answer in the middle of which it was recorded."""
        return (
            f"{self.script.where(entry)}: {cut(entry.line)}: the answer before it ended before its "
            f"token {entry.during}, where this ran; it runs behind it"
        )

    def _compare(self, entry: Entry) -> None:
        if entry.mark is None:
            return
        found, name = self.bench.mark, self.bench.recorded_name
        staged = name(found.staged) if found.staged else None
        found = replace(found, state=name(found.state), staged=staged)
        if self.script.format == 1:
            found = replace(found, steered="")
        if found != entry.mark:
            raise ReplayError(
                f"{self.script.where(entry)}: after {shown(entry.line)} expected {entry.mark}, "
                f"found {found}"
            )
        self.compared += 1

    def _nested(self, line: str, ctx: Context, due: list[During] | None = None) -> JobEnded:
        ended = self.bench.wiring.nested(line, ctx, due)
        if ended.cancelled:
            raise Cancelled(f"cancelled at {shown(line)}")
        return ended

    def _must(self, ended: JobEnded, what: str) -> None:
        if ended.error is not None:
            raise ReplayError(f"{self.script.path}: {what}: {ended.error}")


def expects_error(line: str) -> bool:
    """Whether `line` asserts that the command before it fails."""
    return line.split()[:2] == ["expect", "error"]
