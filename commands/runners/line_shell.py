"""The line shell (`--plain`), for SSH and screen readers: no cursor movement, no boxes.

Ctrl-C cancels the running command, and clears the line at the prompt; Ctrl-D ends the session.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from commands.interrupts import Terminated
from commands.runners.event_printer import EventPrinter
from commands.runners.headless import FAILED, OK, USAGE
from mlxfun.events import JobEnded
from mlxfun.text import one_line

if TYPE_CHECKING:
    from types import ModuleType

    from commands.engine import Engine

HISTORY_LINES = 1000
MAX_INTERRUPTS = 3  # this many Ctrl-C during one command end the program


class LineShell:
    """Reads command lines, runs each, prints its outcome."""

    def __init__(self, engine: Engine, printer: EventPrinter, stdin: TextIO | None = None) -> None:
        self.engine = engine
        self.printer = printer
        self.stdin = stdin or sys.stdin
        self.interactive = self.stdin.isatty()
        self.code = OK

    def run(self, lines: Sequence[str], history: Path | None = None) -> int:
        """Run `lines`, then what is typed. Returns 0, or the first failure of a piped session."""
        keeper = _LineEditing(self.engine, history) if self.interactive else None
        try:
            if all(self._announced(line) for line in lines):
                self._loop()
        finally:
            if keeper is not None:
                keeper.save()
        return OK if self.interactive else self.code

    def _loop(self) -> None:
        if self.interactive:
            self.printer.say("type help for the commands, Ctrl-D to leave")
        for line in self._typed():
            if line.strip() and not line.lstrip().startswith("#") and not self._one(line):
                return

    def _typed(self) -> Iterator[str]:
        """The lines typed at the prompt, or those of a pipe."""
        if not self.interactive:
            yield from self.stdin
            return
        while True:
            try:
                yield input(self._prompt())
            except EOFError:
                self.printer.say("")
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                self.printer.say("")

    def _prompt(self) -> str:
        view = self.engine.view()
        if view.model is None:
            return "no model> "
        side = " candidate" if view.live == "candidate" else ""
        return f"{one_line(view.model.model_id)} {view.state[:6]}{side}> "

    def _one(self, line: str) -> bool:
        """Run one line; False if it ends the session."""
        ended = self._wait(self.engine.run(line))
        if ended.error is not None:
            self.code = self.code or (USAGE if ended.usage else FAILED)
        return ended.report is None or ended.report.kind != "quit"

    def _announced(self, line: str) -> bool:
        self.printer.heading(line)
        return self._one(line)

    def _wait(self, job: int) -> JobEnded:
        presses = 0
        while True:
            try:
                return self.printer.follow(job)
            except Terminated:
                raise
            except KeyboardInterrupt:
                presses += 1
                if presses >= MAX_INTERRUPTS:
                    raise
                self.printer.say("cancelling")
                self.engine.cancel()


class _LineEditing:
    """Readline with completion, and a history that is kept between sessions."""

    def __init__(self, engine: Engine, path: Path | None) -> None:
        self.path = path
        self.readline = _readline()
        self._matches: list[str] = []
        self._engine = engine
        if self.readline is None:
            return
        self.readline.set_completer_delims(" \t")
        self.readline.set_completer(self._complete)
        libedit = "libedit" in (self.readline.__doc__ or "")
        self.readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if path is not None:
            try:
                self.readline.read_history_file(str(path))
            except OSError:
                return  # none yet, or not readable: the session works without

    def _complete(self, _text: str, state: int) -> str | None:
        if self.readline is None:
            return None
        if state == 0:
            line = self.readline.get_line_buffer()[: self.readline.get_endidx()]
            begin = self.readline.get_begidx()
            # Readline replaces from its own idea of a word; a quoted word may begin earlier.
            self._matches = [
                line[begin : c.start] + c.text[max(0, begin - c.start) :]
                for c in self._engine.complete(line)
            ]
        return self._matches[state] if state < len(self._matches) else None

    def save(self) -> None:
        """Write the history file, if it can be written."""
        if self.readline is None or self.path is None:
            return
        self.readline.set_history_length(HISTORY_LINES)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.readline.write_history_file(str(self.path))
        except OSError:
            return


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Python built without it: plain input still works
        return None
    return readline


def history_path() -> Path:
    """The file of typed lines, kept between sessions."""
    from platformdirs import user_state_path

    return user_state_path("mlxfun") / "plain_history"
