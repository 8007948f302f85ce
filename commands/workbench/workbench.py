"""What command handlers work with: the session, the shell's settings, output paths.

It lives on the worker thread, like the session in it.
"""

from __future__ import annotations

import gc
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from commands.workbench.files import Files, Loaded, exists
from commands.workbench.journal import Journal
from commands.workbench.residency import Residency
from commands.workbench.session_file import Mark
from commands.workbench.settings import Settings
from commands.workbench.wiring import Server, Wiring
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import Context
from mlxfun.data.options import Weighted
from mlxfun.errors import DatasetError, SaveError, StateError, UsageError
from mlxfun.events import Notice
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report
from mlxfun.session.reports import SessionView

if TYPE_CHECKING:
    from mlxfun.data.scan_reports import Identity
    from mlxfun.session.session import Session

_WEIGHED = re.compile(r"(.+):(\d+(?:\.\d+)?)\Z", re.DOTALL)


class Workbench:
    """The state of one shell.

    sessions: the directory where sessions are kept until they end, None if they are not kept.
    offer_resume: whether the next load tells of sessions that were cut short. kept_statistics: a
    file that the next calibration reads instead of running. recorded_name: what the script that is
    being replayed calls a state. answers: those of this session. last, last_error: outcome of the
    last command, for `expect`; exactly one is set once a command has run. identities: the cache of
    fingerprints of checkpoints, None for none.
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
        self._session: Session | None = None
        self.journal = journal
        self.settings = settings
        self.files = files
        self.undo_budget = undo_budget
        self.keep_going = False
        self.sessions: Path | None = None
        self.offer_resume = True
        self.answers: list[ChatReport] = []
        self.kept_statistics: Path | None = None
        self.recorded_name: Callable[[str], str] = str
        self.identities: Path | None = None
        self.loaded: Loaded | None = None
        self.server: Server | None = None
        self.last: Report | None = None
        self.last_error: str | None = None

    @property
    def session(self) -> Session:
        """The resident model. Raises StateError when there is none."""
        if self._session is None:
            raise StateError("no model is loaded: type load PATH, or load demo")
        return self._session

    @property
    def caveat(self) -> str:
        """What is different about the answers of the model, "" for nothing: see Report."""
        return self._session.caveat if self._session is not None else ""

    def view(self) -> SessionView:
        """The session at this moment; the empty view without a model."""
        view = self._session.view() if self._session is not None else SessionView()
        return view if self.server is None else replace(view, serving=self.server.address)

    def served(self) -> Server:
        """The server beside the front end. Raises StateError when there is none."""
        if self.server is None:
            raise StateError("nothing is served: start with mlxfun-shell MODEL --serve")
        return self.server

    @property
    def mark(self) -> Mark:
        """The present state as a session file writes it."""
        view = self.view()
        return Mark(view.state, view.plan.state_after if view.plan else None, view.steered)

    def known(self, made_on: Identity) -> Identity:
        """The present name of an identity of an earlier version, if it is the resident model's."""
        return made_on if self._session is None else self._session.known(made_on)

    def change(self, settings: Settings) -> None:
        """Replace the settings; the session follows those that are its own."""
        self.settings = settings
        if self._session is not None:
            self._session.steering_in_history = settings.undo_steering

    def name(self, line: str) -> None:
        """Set the command line that the session writes to its history and to saved models."""
        if self._session is not None:
            self._session.command = line

    @contextmanager
    def named(self, line: str) -> Iterator[None]:
        """`name` for a while: of a line that runs in the middle of another one."""
        before = self._session.command if self._session is not None else ""
        self.name(line)
        try:
            yield
        finally:
            self.name(before)

    def load(
        self,
        source: str,
        revision: str | None,
        drop: bool,
        ctx: Context,
        chat_template: Path | None = None,
        residency: Residency | None = None,
    ) -> Report:
        """Open a session for `source`; the old one is closed once the new one is there.

        drop: close the old one first.
        """
        options = self._options(revision, chat_template, residency or Residency())
        if drop:
            self.close()
        found = self.source(source)
        _offer_recovery(Path(found).parent, ctx)
        opened = self.wiring.session_class(ctx).open(
            found,
            options,
            undo_budget=self.undo_budget,
            seed=self.settings.seed,
            ctx=ctx,
        )
        self.close()
        self._session = opened
        opened.steering_in_history = self.settings.undo_steering
        report = opened.info()
        self._note_recent(found)
        self.loaded = Loaded(
            source,
            revision,
            opened.checkpoint_id,
            opened.state,
            Path(report.source).absolute(),
            str(chat_template) if chat_template is not None else None,
            shlex.join((residency or Residency()).words),
        )
        # Loading imports transformers, hundreds of thousands of objects that live for ever. A full
        # collection visits them all under the interpreter's lock, and the screen freezes.
        gc.collect()
        gc.freeze()
        return report

    def _options(
        self, revision: str | None, chat_template: Path | None, held: Residency
    ) -> LoadOptions:
        """How a model is loaded, with the paths that may be read and written."""
        template = self.readable(chat_template) if chat_template is not None else None
        if held.profile is not None:
            held = replace(held, profile=self.readable(held.profile))
        if held.resident == "none":
            held = replace(held, scratch=self._scratch(held.scratch))
        profiles = self.identities.parent / "profiles" if self.identities is not None else None
        return held.added_to(LoadOptions(revision, template, self.identities, profiles=profiles))

    @property
    def _recent(self) -> Path | None:
        """The list of models that were loaded of late."""
        return None if self.identities is None else self.identities.parent / "recent.json"

    def _note_recent(self, source: str | Path) -> None:
        from mlxfun.memory.plan.local import note_recent  # it imports MLX

        if self._recent is not None and source != "demo":
            known = source if isinstance(source, str) else str(source.absolute())
            note_recent(self._recent, known)

    def models(self, ctx: Context) -> Report:
        """What can be loaded without a download."""
        from mlxfun.memory.plan.local import local_models, read_recent  # it imports MLX

        return local_models(read_recent(self._recent) if self._recent is not None else (), ctx)

    def _scratch(self, named: Path | None) -> Path | None:
        """The scratch directory that was named, or one in the cache."""
        if named is not None:
            return self.files.writable_directory(named)
        return None if self.identities is None else self.identities.parent / "streamed"

    def source(self, source: str) -> str | Path:
        """The demo by its name, a path if one exists or the text looks like one, otherwise the Hub id as typed."""
        if source == "demo":
            return source
        path = self.files.readable(Path(source))
        return path if exists(path) or source.startswith((".", "/", "~")) else source

    def close(self) -> None:
        """Close the session."""
        session, self._session, self.loaded = self._session, None, None
        if session is not None:
            # What `load` has frozen would never be collected, the model included.
            gc.unfreeze()
            session.close()

    @contextmanager
    def dataset(self, named: tuple[str, ...]) -> Iterator[Weighted]:
        """The data sets to use inside the block: those `named`, or the last ones.

        Named ones are kept for the next command that names none, unless they cannot be read: one
        does not exist, or the block raises DatasetError.
        """
        chosen = named or self.settings.dataset
        if chosen is None:
            raise UsageError("which data set? Give --dataset PATH, or --dataset demo:mixed")
        found = self.readable_sources((chosen,) if isinstance(chosen, str) else chosen)
        # Not every command gets as far as reading it, so look whether it exists.
        good = bool(named) and all(s.startswith("demo:") or exists(Path(s)) for s, _ in found)
        try:
            yield found
        except DatasetError:
            good = False
            raise
        finally:
            if good:
                kept = named[0] if len(named) == 1 else named
                self.settings = replace(self.settings, dataset=kept)

    def readable_source(self, source: str) -> str:
        """`source` with a path resolved as `Files.readable` does."""
        return source if source.startswith("demo:") else str(self.readable(Path(source)))

    def readable_sources(self, named: tuple[str, ...]) -> Weighted:
        """Sources and weights: a.jsonl:2 is a.jsonl with weight 2, unless there is such a file."""
        found: list[tuple[str, float | None]] = []
        for word in named:
            match = _WEIGHED.match(word)
            if match is None or exists(self.readable(Path(word))):
                found.append((self.readable_source(word), None))
                continue
            weight = float(match[2])
            if not 0 < weight < float("inf"):
                raise UsageError(f"the weight of {word} must be above 0")
            found.append((self.readable_source(match[1]), weight))
        return tuple(found)

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


def _offer_recovery(directory: Path, ctx: Context) -> None:
    """Emit notices of models that a killed `save --force` left under their backup name."""
    from mlxfun.checkpoint.replacing.atomic import recoverable

    try:
        backups = recoverable(directory)
    except OSError:
        return  # not readable: loading raises the error, if it matters
    # Before loading: a model that is missing may be one of these.
    for backup in backups:
        ctx.emit(
            Notice(
                "offer",
                f"{backup} is a whole model that a save was replacing when it was cut short",
                f"recover {shlex.quote(str(directory))}",
            )
        )
