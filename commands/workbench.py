"""What command handlers work with: the session, the shell's settings, output paths.

It lives on the worker thread, like the session in it.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxfun.context import Context
from mlxfun.errors import DatasetError, SaveError, StateError, UsageError
from mlxfun.events import Notice
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report
from mlxfun.session.reports import SessionView

if TYPE_CHECKING:
    from commands.ports import OpenSession, SessionPort
    from commands.scripts.session_file import Journal
    from mlxfun.events import JobEnded


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the engine lends the handlers.

    nested: runs a command line inside the running job (replays). command_of: the name of the
    command a line means, UsageError if it is none. help_text: a help page, or the overview.
    """

    open_session: OpenSession
    nested: Callable[[str, Context], JobEnded]
    command_of: Callable[[str], str]
    help_text: Callable[[str | None], str]


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults that `set` changes; an option on the command line goes before them."""

    seed: int = 0
    dataset: str | None = None
    metric: str = "reap_sum"
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    max_kl: float | None = None
    max_perplexity_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The resident model as a replay names it. state: the one right after loading.

    directory: where its files are, which nothing is written to.
    """

    source: str
    revision: str | None
    checkpoint: str
    state: str
    directory: Path

    def owns(self, path: Path) -> bool:
        """Whether `path` lies inside the model's directory, or is a file that it links to."""
        target, own = (Path(os.path.realpath(p)) for p in (path, self.directory))
        if target.is_relative_to(own):
            return True
        # A snapshot of the Hub's cache consists of links.
        return target in {Path(os.path.realpath(f)) for f in own.glob("*")}


@dataclass(slots=True)
class Files:
    """Where a command may read and write.

    root: writes stay below it (None: anywhere). script: the directory of the replay file, which
    relative paths that do not exist here are looked up in.
    """

    root: Path | None = None
    script: Path | None = None

    def writable(self, path: Path) -> Path:
        """Where a command that writes `path` shall write. Raises UsageError outside the root."""
        if self.root is None:
            return path
        root = self.root.resolve()
        target = (root / path).resolve()
        if target == root or not target.is_relative_to(root):
            raise UsageError(
                f"{path} lies outside the output root {root}: use a path below it, or choose "
                "another with --output-root"
            )
        return target

    def writable_directory(self, path: Path) -> Path:
        """Where a command that writes below the directory `path` shall do so: the root, too."""
        if self.root is not None and (self.root / path).resolve() == self.root.resolve():
            return self.root
        return self.writable(path)

    def readable(self, path: Path) -> Path:
        """Where to read `path`: what this run wrote first, then here, then beside the script."""
        path = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
        if path.is_absolute():
            return path
        if self.root is not None and _there(self.root / path):
            return self.root / path
        if self.script is not None and not _there(path) and _there(self.script / path):
            return self.script / path
        return path


class Workbench:
    """The state of one shell.

    sessions: where sessions are kept until they end, None where they are not. offering: whether the
    next load tells of sessions that were cut short. known: statistics
    that the next calibration reads instead of running. turns: what was said to the model. last, last_error: outcome of the last command, which `expect` looks at; exactly one is set once
    a command has run.
    """

    def __init__(
        self,
        wiring: Wiring,
        *,
        journal: Journal,
        settings: Settings,
        files: Files,
        undo_budget: int | None,
    ) -> None:
        self.wiring = wiring
        self._session: SessionPort | None = None
        self.journal = journal
        self.settings = settings
        self.files = files
        self.undo_budget = undo_budget
        self.keep_going = False
        self.sessions: Path | None = None
        self.offering = True
        self.turns: list[ChatReport] = []
        self.known: Path | None = None
        self.loaded: Loaded | None = None
        self.last: Report | None = None
        self.last_error: str | None = None

    @property
    def session(self) -> SessionPort:
        """The resident model. Raises StateError when there is none."""
        if self._session is None:
            raise StateError("no model is loaded: type load PATH, or load demo")
        return self._session

    def view(self) -> SessionView:
        """The session at this moment; the empty view without a model."""
        return self._session.view() if self._session is not None else SessionView()

    def name(self, line: str) -> None:
        """Tell the session which line is about to run: its history shows it."""
        if self._session is not None:
            self._session.command = line

    def load(self, source: str, revision: str | None, drop: bool, ctx: Context) -> Report:
        """Open a session for `source`; the old one goes when the new one stands."""
        if drop:
            self.close()
        found = source if source == "demo" else self._local(source)
        _offer_recovery(Path(found).parent, ctx)
        opened = self.wiring.open_session(
            found,
            revision=revision,
            undo_budget=self.undo_budget,
            seed=self.settings.seed,
            ctx=ctx,
        )
        self.close()
        self._session = opened
        report = opened.info()
        self.loaded = Loaded(
            source, revision, opened.checkpoint_id, opened.state, Path(report.source).absolute()
        )
        # Loading imports transformers, hundreds of thousands of objects that live for ever. A full
        # collection walks them all under the interpreter's lock, and the screen stands still.
        gc.collect()
        gc.freeze()
        if self.offering:
            from commands.scripts.resume import offer

            offer(self.sessions, ctx)
        self.offering = False
        return report

    def _local(self, source: str) -> str | Path:
        """A path if there is one (or it was meant as one), otherwise a Hub id as typed."""
        path = self.files.readable(Path(source))
        return path if _there(path) or source.startswith((".", "/", "~")) else source

    def close(self) -> None:
        """Let the session go."""
        session, self._session, self.loaded = self._session, None, None
        if session is not None:
            session.close()

    @contextmanager
    def dataset(self, source: str | None) -> Iterator[str]:
        """The data set to use inside the block: `source`, or the one remembered.

        A named one is remembered for the next command that names none, unless it cannot be read:
        it is not there, or the block raises DatasetError.
        """
        chosen = source or self.settings.dataset
        if chosen is None:
            raise UsageError("which data set? Give --dataset PATH, or --dataset demo:mixed")
        found = self.readable_source(chosen)
        # Looked for as well: not every command gets as far as reading it, or needs to.
        good = source is not None and (found.startswith("demo:") or _there(Path(found)))
        try:
            yield found
        except DatasetError:
            good = False
            raise
        finally:
            if good:
                self.settings = replace(self.settings, dataset=source)

    def readable_source(self, source: str) -> str:
        """`source` with a path resolved as `Files.readable` does."""
        return source if source.startswith("demo:") else str(self.readable(Path(source)))

    def readable(self, path: Path) -> Path:
        """See `Files.readable`."""
        return self.files.readable(path)

    def writable(self, path: Path) -> Path:
        """See `Files.writable`. Raises SaveError for a file of the resident model, too."""
        target = self.files.writable(path)
        if self.loaded is not None and self.loaded.owns(target):
            raise SaveError(
                f"{path} belongs to the model that is loaded from {self.loaded.directory}; choose "
                "another place"
            )
        return target


def _there(path: Path) -> bool:
    # Not path.exists(), which raises OSError for a name that no file system takes.
    return os.path.exists(path)


def _offer_recovery(directory: Path, ctx: Context) -> None:
    """Tell of models that a killed `save --force` has left under their backup name."""
    from mlxfun.checkpoint.atomic import recoverable

    try:
        backups = recoverable(directory)
    except OSError:
        return  # not readable: loading says so, if it matters
    # A model that is missing may be one of these, so this comes before any error about it.
    for backup in backups:
        ctx.emit(
            Notice(
                "warning",
                f"{backup} is a whole model that a save was replacing when it was cut short: type "
                f"recover {shlex.quote(str(directory))} to put it back",
            )
        )
