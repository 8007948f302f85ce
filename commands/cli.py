"""The `mlxfun-shell` program: options, and which front end gets the engine.

Only the standard library and Click are imported at the top, so that --help is instant.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from commands.engine import Engine

CLOSE_SECONDS = 5.0
BROKEN_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ended

# Found at run time: `commands` lies below `tui` and must not import it, yet the program that starts
# the screen is the one that parses the command line.
SCREEN = ("tui.app", "run")


class Interrupted(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C; holds the signal number."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the command line asks for."""

    model: str | None
    demo: bool
    front_end: str
    commands: tuple[str, ...]
    replay: Path | None
    record: Path | None
    output_root: Path | None
    as_json: bool
    seed: int | None
    undo_budget: str | None
    keep_going: bool

    @property
    def lines(self) -> tuple[str, ...]:
        """Every command line to run, in order."""
        found = []
        if self.demo or self.model is not None:
            found.append(shlex.join(["load", "demo" if self.demo else str(self.model)]))
        if self.replay is not None:
            found.append(shlex.join(["replay", str(self.replay)]))
        return (*found, *self.commands)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--demo", is_flag=True, help="Load the model that comes with mlxfun.")
@click.option("--plain", is_flag=True, help="Line by line, for SSH and screen readers.")
@click.option("--headless", is_flag=True, help="No questions asked: run -c or --replay, and end.")
@click.option(
    "-c", "commands", multiple=True, metavar="COMMAND", help="Run this first. Repeatable, in order."
)
@click.option("--replay", type=click.Path(path_type=Path), help="Run a recorded session.")
@click.option("--record", type=click.Path(path_type=Path), help="Record the session to this file.")
@click.option(
    "--output-root",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Save below DIR only. For a replay, the default is a temporary directory.",
)
@click.option("--json", "as_json", is_flag=True, help="With --headless: one JSON object a command.")
@click.option("--seed", type=int, metavar="N", help="Seed of everything drawn (default: 0).")
@click.option("--undo-budget", metavar="SIZE", help="What the undo history may hold, e.g. 2GiB.")
@click.option("--keep-going", is_flag=True, help="Headless: go on after a command that fails.")
@click.version_option(package_name="mlxfun", prog_name="mlxfun-shell")
def shell(plain: bool, headless: bool, **options: Any) -> None:
    """Watch, prune, steer and save Mixture-of-Experts models.

    MODEL is a directory or a Hub id. Without --plain or --headless the full screen opens; type
    help there, or press F1.
    """
    if plain and headless:
        raise click.UsageError("--plain and --headless exclude each other")
    front_end = "plain" if plain else "headless" if headless else "screen"
    start = Start(front_end=front_end, **options)
    _check(start)
    sys.exit(run(start))


def _check(start: Start) -> None:
    """Raise click.UsageError for options that do not go together."""
    if start.demo and start.model is not None:
        raise click.UsageError(f"--demo and the model {start.model} exclude each other")
    if start.as_json and start.front_end != "headless":
        raise click.UsageError("--json needs --headless")
    if start.front_end == "headless" and not start.lines:
        raise click.UsageError("--headless has nothing to do: give -c COMMAND or --replay FILE")
    if start.front_end == "screen" and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError(
            "no terminal to draw on: add --headless to run -c or --replay in a script, or --plain "
            "to read commands line by line"
        )


def run(start: Start) -> int:
    """Start engine and front end; returns the exit code."""
    from commands.engine import Engine
    from commands.types import Size
    from mlxfun.errors import UsageError

    budget = Size.parse(start.undo_budget) if start.undo_budget else None
    engine = Engine(
        seed=start.seed or 0,
        undo_budget=budget,
        output_root=start.output_root,
        keep_going=start.keep_going,
    )
    try:
        if start.record is not None:
            engine.record(start.record)
        return _front_end(start, engine)
    except UsageError as problem:
        raise click.UsageError(str(problem)) from None
    finally:
        engine.close(CLOSE_SECONDS)


def _front_end(start: Start, engine: Engine) -> int:
    if start.front_end == "headless":
        from commands.headless import Headless

        return Headless(engine, as_json=start.as_json, keep_going=start.keep_going).run(start.lines)
    module, function = SCREEN
    return int(getattr(import_module(module), function)(engine, startup_lines=start.lines))


def main() -> None:
    """Entry point of `mlxfun-shell`."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        shell.main(standalone_mode=True)
    except KeyboardInterrupt as problem:
        number = problem.args[0] if isinstance(problem, Interrupted) else signal.SIGINT
        click.echo("interrupted: the model and all files are as they were", err=True)
        sys.exit(128 + number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


if __name__ == "__main__":
    main()
