"""What the command line of the program asks for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from commands import serving
from commands.config import Config
from commands.workbench.residency import Residency

FrontEnd = Literal["screen", "plain", "headless"]


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
