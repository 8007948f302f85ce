"""Services that the engine passes to command handlers, so that they import neither it nor the
registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from commands.workbench.interleave import During
    from mlxfun.context import Context
    from mlxfun.events import JobEnded
    from mlxfun.serving.snapshot import ServingReport
    from mlxfun.session.session import Session


class Declared(Protocol):
    """What session files and recipes ask of a command; `commands.declare.Command` has it."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def read_only(self) -> bool: ...


class Nested(Protocol):
    """Runs a command line inside the running job."""

    def __call__(self, line: str, parent: Context, due: list[During] | None = None) -> JobEnded:
        """The outcome of `line`. due: what runs in the middle of it; what has run is taken out."""


ServeAction = Literal["show", "pause", "resume", "drain", "stop"]


class Server(Protocol):
    """The server beside the front end. May be used from any thread."""

    @property
    def address(self) -> str: ...

    def snapshot(self) -> ServingReport:
        """What it does, as of a moment ago."""

    def act(self, action: ServeAction) -> ServingReport:
        """Hold requests back, refuse new ones, answer again, or stop. Raises StateError once it has
        stopped."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """The engine's services for handlers.

    session_class: imports the class of sessions, which brings MLX. nested: runs a command line
    inside the running job. command_of: the command that a line means, UsageError if the line is not
    valid. help_text: a help page, or the overview for None.
    """

    session_class: Callable[[Context], type[Session]]
    nested: Nested
    command_of: Callable[[str], Declared]
    help_text: Callable[[str | None], str]
