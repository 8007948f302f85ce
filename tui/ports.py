"""The protocol of the command engine as the screen uses it, so that tests can replace it.

The screen imports no engine: it is handed one. These protocols are the whole of what it may use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlxfun.events import Event
from mlxfun.serving.snapshot import ServingReport
from mlxfun.session.reports import SessionView

if TYPE_CHECKING:
    from commands.forms.form import Form


class Completion(Protocol):
    """One completion: replace `line[start:]` by `text`. hint: a short description of it."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def hint(self) -> str: ...


class Row(Protocol):
    """One command as the registry declares it. reason: why it is not `enabled` at this moment."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def usage(self) -> str: ...
    @property
    def enabled(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Engine(Protocol):
    """The command engine, whose work happens on its own thread. No call here blocks."""

    @property
    def busy(self) -> str | None:
        """The command line that is running, if any."""

    @property
    def queue(self) -> tuple[str, ...]:
        """The command lines that wait."""

    @property
    def recording(self) -> Path | None:
        """The file that is recorded to, if any."""

    @property
    def chat_defaults(self) -> Mapping[str, float]:
        """Temperature, max_tokens and seed of answers that do not say."""

    def offer(self) -> None:
        """Emit the offer of a session that was cut short, if there is one."""

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event, on the thread that makes it."""

    def run(self, line: str) -> int:
        """Queue a command line and return its job id; errors arrive as `JobEnded`."""

    def cancel(self, only: str | None = None) -> None:
        """Cancel the running job; a second call drops the queued ones too.

        only: cancel nothing unless it is this line that runs.
        """

    def complete(self, line: str) -> Sequence[Completion]:
        """The completions of `line`, best first."""

    def form(self, line: str) -> Form | None:
        """The form of a command line, None for one that has none."""

    def filled_in(self, line: str, name: str, text: str) -> str:
        """`line` with another value for the parameter `name`; "" takes it out. Raises UsageError."""

    def complete_field(self, line: str, name: str, text: str) -> Sequence[Completion]:
        """The completions of one field of the form of `line`, best first."""

    def help(self, name: str | None, width: int = 78) -> str:
        """The help page of a command or a guide, or the list of all; `width`: its columns."""

    def view(self) -> SessionView:
        """The session after the last finished job."""

    def serving(self) -> ServingReport | None:
        """What the server beside the screen does, None without one."""

    def rows(self) -> Sequence[Row]:
        """Every command, with whether it applies now."""

    def close(self, timeout: float = 5.0) -> None:
        """Stop the worker, waiting at most `timeout` seconds."""
