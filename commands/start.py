"""What the command line of the program asks for."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import click

from commands import serving, streams
from commands.config import Config
from commands.workbench.residency import Residency
from mlxfun.serving.options import Address

# Found at run time: `commands` lies below `tui` and must not import it, yet the program that starts
# the screen is the one that parses the command line.
SCREEN = ("tui.app", "run")
IN_BROWSERS = ("tui.web.server", "run")
AT_WEB = "127.0.0.1:8000"

FrontEnd = Literal["screen", "web", "plain", "headless"]


@dataclass(frozen=True, slots=True)
class Web:
    """The screen in a browser: where, and the token that it is shown for."""

    address: Address
    token: str


@dataclass(frozen=True, slots=True)
class Start:
    """What the command line asks for."""

    model: str | None
    demo: bool
    front_end: FrontEnd
    commands: tuple[str, ...]
    replay: Path | None
    record: Path | None
    output_root: Path | None
    as_json: bool
    seed: int | None
    undo_budget: str | None
    keep_going: bool
    resume: bool = False
    chat_template: Path | None = None
    workers: int | None = None
    hostfile: Path | None = None
    config: Config = field(default_factory=Config)
    serve: serving.Serve | None = None
    web: Web | None = None
    residency: Residency = field(default_factory=Residency)

    @property
    def of_model(self) -> str:
        """The first option given that is about the model, "" for none."""
        given = (
            ("--chat-template", self.chat_template),
            ("--workers", self.workers),
            ("--hostfile", self.hostfile),
        )
        words = [name for name, value in given if value is not None]
        return next(iter((*words, *self.residency.words)), "")

    @property
    def lines(self) -> tuple[str, ...]:
        """Every command line to run, in order."""
        found = ["resume"] if self.resume else []
        if self.demo or self.model is not None:
            words = ["load", "demo" if self.demo else str(self.model)]
            if self.chat_template is not None:
                words += ["--chat-template", str(self.chat_template)]
            found.append(shlex.join([*words, *self.residency.words]))
            if self.workers is not None:
                found.append(f"workers {self.workers}")
            if self.hostfile is not None:
                found.append(shlex.join(["workers", "--hostfile", str(self.hostfile)]))
        # Behind the load, which becomes the header of a recording; in it, so that a replay
        # elsewhere does the same.
        for name, value in self.config.defaults.items():
            found.append(shlex.join(["set", name, str(value)]))
        if self.replay is not None:
            found.append(shlex.join(["replay", str(self.replay)]))
        return (*found, *(self.serve.lines if self.serve else ()), *self.commands)


def web_of(where: str, token: str | None) -> Web:
    """Where the screen is shown; a token is made up where none is given."""
    import secrets

    from mlxfun.errors import UsageError
    from mlxfun.serving.options import ServeOptions

    try:
        address = Address.parse(where)
        ServeOptions(address, token or None)
    except UsageError as problem:
        raise click.UsageError(str(problem).replace("serve at", "--web")) from None
    return Web(address, token or secrets.token_urlsafe(24))


def screen_of(start: Start) -> Callable[..., int]:
    """What shows the screen, here or in browsers. Raises click.UsageError."""
    if start.web is None:
        module, function = SCREEN
        shown: Callable[..., int] = getattr(import_module(module), function)
        return shown
    module, function = IN_BROWSERS
    try:
        show = getattr(import_module(module), function)
    except ImportError as problem:
        raise click.UsageError(
            f"--web needs a package more: pip install 'mlxfun[web]' ({problem})"
        ) from None
    told = partial(_told, "the screen is at")
    return partial(show, wanted=start.web, told=told)


def _told(what: str, address: str) -> None:
    streams.say(f"{what} {address}")
