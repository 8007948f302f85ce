"""The `mlxfun-shell` program: parses its options, builds the engine, starts a front end.

Only the standard library and Click are imported at the top, so that --help is instant.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands import interrupts, serving, streams
from commands.config import Config, read_config
from commands.guides.index import GUIDES
from commands.start import AT_WEB, FrontEnd, Start, screen_of, web_of
from commands.types import Seed
from commands.workbench.residency import NAMES, Residency, residency_options
from mlxfun import __version__

if TYPE_CHECKING:
    from commands.engine import Engine

NAME = "mlxfun-shell"
# The user is leaving: a forward pass that takes longer is not worth waiting for, and a save that is
# cut short leaves a hidden directory that the next save removes.
CLOSE_SECONDS = 2.0
BROKEN_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ended


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Guides, read with --headless -c 'help NAME': {', '.join(GUIDES)}.",
)
@click.argument("model", required=False)
@click.option("--demo", is_flag=True, help="Load the model that comes with mlxfun.")
@click.option("--plain", is_flag=True, help="Line by line, for SSH and screen readers.")
@click.option(
    "--web",
    is_flag=False,
    flag_value=AT_WEB,
    metavar="[HOST:PORT]",
    help=f"The full screen in a browser (default: {AT_WEB}).",
)
@click.option("--headless", is_flag=True, help="No questions asked: run -c or --replay, and end.")
@click.option(
    "-c", "commands", multiple=True, metavar="COMMAND", help="Run this first. Repeatable, in order."
)
@click.option("--replay", type=click.Path(path_type=Path), help="Run a recorded session.")
@click.option("--resume", is_flag=True, help="Bring back the session that was cut short.")
@click.option("--record", type=click.Path(path_type=Path), help="Record the session to this file.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use this chat template, not the model's.",
)
@click.option("--workers", metavar="N", type=int, help="Run passes on N processes here.")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run passes on the hosts of this file.",
)
@click.option(
    "--output-root",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Save below DIR only. For a replay, the default is a temporary directory.",
)
@click.option("--json", "as_json", is_flag=True, help="With --headless: one JSON object a command.")
@click.option("--seed", type=Seed(), metavar="N", help="Seed of everything drawn (default: 0).")
@click.option("--undo-budget", metavar="SIZE", help="What the undo history may hold, e.g. 2GiB.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read this configuration, not the user's. Not for headless runs and replays.",
)
@click.option("--keep-going", is_flag=True, help="Headless: go on after a command that fails.")
@residency_options
@serving.serve_options
@click.version_option(__version__, prog_name=NAME)
def shell(
    plain: bool, headless: bool, web: str | None, config: Path | None, **options: Any
) -> Start:
    """Watch, prune, steer and save Mixture-of-Experts models.

    MODEL is a directory or a Hub id. Without --plain or --headless the full screen opens; type
    help there, or press F1. MODEL prune --help and its like explain the one-shot commands.
    """
    asked = [
        name for name, on in (("--plain", plain), ("--headless", headless), ("--web", web)) if on
    ]
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)} exclude each other")
    front_ends: dict[str, FrontEnd] = {"--plain": "plain", "--headless": "headless", "--web": "web"}
    front_end = front_ends[asked[0]] if asked else "screen"
    held = Residency.taken({name: options.pop(name) for name in NAMES})
    in_browsers = web_of(web, options["token"]) if web is not None else None
    served = serving.taken(options, also=("token",) if web is not None else ())
    start = Start(front_end=front_end, serve=served, web=in_browsers, residency=held, **options)
    _check(start)
    return replace(start, config=_config(start, config))


def _config(start: Start, path: Path | None) -> Config:
    """The configuration; the empty one for scripts, which must not depend on the user's."""
    from mlxfun.errors import UsageError

    scripted = start.front_end == "headless" or start.replay is not None
    if scripted and path is not None:
        raise click.UsageError(
            "--config is for the screen and --plain: a script says what it wants"
        )
    if scripted:
        return Config()
    try:
        return read_config(path)
    except UsageError as problem:
        raise click.UsageError(str(problem)) from None


def _check(start: Start) -> None:
    """Raise click.UsageError for options that do not go together."""
    if start.demo and start.model is not None:
        raise click.UsageError(f"--demo and the model {start.model} exclude each other")
    if start.workers is not None and start.hostfile is not None:
        raise click.UsageError("--workers and --hostfile exclude each other")
    if start.of_model and not (start.demo or start.model):
        raise click.UsageError(f"{start.of_model} goes with a model: name one, or add --demo")
    if start.resume and len(start.lines) > 1:
        raise click.UsageError("--resume brings its own model and commands: leave out the others")
    if start.as_json and start.front_end != "headless":
        raise click.UsageError("--json needs --headless")
    if start.keep_going and start.front_end != "headless":
        raise click.UsageError("--keep-going needs --headless")
    if start.front_end == "headless" and not start.lines and start.serve is None:
        raise click.UsageError("--headless has nothing to do: give -c COMMAND or --replay FILE")
    if start.record and start.replay and start.record.resolve() == start.replay.resolve():
        raise click.UsageError(f"--record and --replay both name {start.record}")
    # The screen is drawn on stderr.
    terminals = all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    if start.front_end == "screen" and not terminals:
        raise click.UsageError(
            "no terminal to draw on: add --headless to run -c or --replay in a script, or --plain "
            "to read commands line by line"
        )


def run(start: Start) -> int:
    """Start engine and front end; returns the exit code. Raises click.UsageError."""
    from commands.runners.headless import USAGE, check
    from mlxfun.errors import UsageError

    wrong = check(start.lines)
    if wrong is not None and wrong.error is not None:
        if not start.as_json:
            raise click.UsageError(wrong.error)
        from commands.output.as_json import json_line

        click.echo(json_line(wrong))
        streams.say(f"{NAME}: {wrong.error}")
        return USAGE
    engine = _engine(start)
    try:
        with serving.beside(engine, start.serve):
            code = _guarded(start, engine)
    except UsageError as problem:  # the address is taken, or the extra is not installed
        raise click.UsageError(str(problem)) from None
    finally:
        engine.close(CLOSE_SECONDS)
    if engine.alive:
        # A thread inside MLX cannot be stopped, and finalising the interpreter while it runs
        # crashes: exit without finalising.
        streams.finish()
        os._exit(code)
    return code


def _engine(start: Start) -> Engine:
    from platformdirs import user_cache_path

    from commands.engine import Engine
    from commands.types import Size
    from mlxfun.errors import UsageError

    try:
        given = start.undo_budget
        budget = Size.parse(given) if given is not None else start.config.undo_budget
    except ValueError as problem:
        raise click.UsageError(f"--undo-budget: {problem}") from None
    seed = _seed(start)
    engine = Engine(
        seed=seed,
        undo_budget=budget,
        output_root=start.output_root,
        keep_going=start.keep_going,
        keys=start.config.keys,
    )
    engine.remember_identities(user_cache_path("mlxfun") / "identities.json")
    if start.resume or (start.front_end != "headless" and start.config.keep_sessions):
        _keep(engine)
    if start.record is not None:
        try:
            moved = engine.record(start.record)
        except UsageError as problem:
            engine.close(CLOSE_SECONDS)
            raise click.UsageError(f"--record: {problem}") from None
        if moved is not None:
            streams.say(f"the older recording {start.record} is now {moved}")
    return engine


def _keep(engine: Engine) -> None:
    """Keep the session on disk in case of a crash; a warning where that is not possible."""
    from commands.scripts.resume import default_folder

    try:
        engine.keep(default_folder())
    except OSError as problem:
        streams.say(f"the session is not kept in case of a crash: {problem}")


def _seed(start: Start) -> int:
    """The seed given, or that of the session to replay, whose states depend on it."""
    if start.replay is None:
        return start.seed or 0
    from commands.workbench.session_file import read_script

    recorded = read_script(start.replay).seed
    if start.seed is not None and recorded not in (None, start.seed):
        raise click.UsageError(
            f"--seed {start.seed} contradicts the seed {recorded} of {start.replay}: leave it out"
        )
    return recorded or start.seed or 0


def _guarded(start: Start, engine: Engine) -> int:
    """Run the front end; its exit code, or that of an interrupt or of a broken pipe."""
    try:
        code = _front_end(start, engine)
        engine.forget()
        return code
    except interrupts.Terminated as problem:
        # The usual end of a server: answers are completed, and nothing went wrong.
        return 0 if start.serve is not None else _interrupted(problem)
    except KeyboardInterrupt as problem:
        return _interrupted(problem, ends=start.serve is None)
    except (BrokenPipeError, streams.OutputLost) as problem:
        return _stopped_by_output(problem)


def _front_end(start: Start, engine: Engine) -> int:
    if start.front_end in ("screen", "web"):
        from commands.output.render.dispatch import render
        from mlxfun.errors import UsageError

        show = screen_of(start)
        interrupts.as_python_does()
        interrupts.end_with_terminal()
        try:
            code = show(engine, startup_lines=start.lines, renderer=render, config=start.config)
        except UsageError as problem:  # what only the screen can judge: themes and keys
            raise click.UsageError(str(problem)) from None
        if engine.recording is not None:
            streams.say(f"recorded: {NAME} --headless --replay {engine.recording}")
        return int(code)
    from commands.runners.event_printer import EventPrinter

    if start.front_end == "plain":
        from commands.runners.line_shell import LineShell, history_path

        return LineShell(engine, EventPrinter(engine, stream=True)).run(start.lines, history_path())
    from commands.runners.headless import run_lines

    printer = EventPrinter(engine, as_json=start.as_json)
    code = run_lines(engine, printer, start.lines, start.keep_going)
    if start.serve is not None and code == 0:
        serving.wait()
    return code


def _interrupted(problem: KeyboardInterrupt, ends: bool = True) -> int:
    """ends: there is nothing left to do that a second interrupt could cut short."""
    if ends:
        interrupts.ignore()
    streams.say("interrupted; nothing is left half done")
    return interrupts.exit_code(problem)


def _one_shot(words: list[str]) -> Start | int | None:
    """What a one-shot command asks for, 0 if its help was shown, None if the words name none."""
    if not any(word[:1] != "-" for word in words[:2]):
        return None
    from commands import one_shot  # brings the registry: not for --help

    found = one_shot.named(words)
    if found is None:
        return None
    asked = one_shot.parse(*found, NAME)
    if asked is None:
        return 0
    for note in asked.notes:
        streams.say(f"note: {note}")
    return Start(
        model=asked.model or None,
        demo=False,
        front_end="headless",
        commands=asked.lines,
        replay=None,
        record=None,
        output_root=asked.output_root,
        as_json=asked.as_json,
        seed=None,
        undo_budget=None,
        keep_going=False,
    )


def _stopped_by_output(problem: BrokenPipeError | streams.OutputLost) -> int:
    """The exit code when standard output takes no more. Nothing may be written to it any longer,
    not even by the interpreter's last flush. A reader that went away is told nothing."""
    streams.discard(sys.stdout)
    return BROKEN_PIPE if isinstance(problem, BrokenPipeError) else _output_lost(str(problem))


def _output_lost(reason: str) -> int:
    streams.say(f"{NAME}: cannot write to standard output: {reason}")
    return 1


def main() -> None:
    """Entry point of `mlxfun-shell`."""
    try:
        streams.prepare()
        interrupts.listen()
        code = _main()
    except KeyboardInterrupt as problem:
        code = _interrupted(problem)
    interrupts.ignore()  # the interpreter is finalised now, which takes a moment
    reason = streams.finish()
    if reason is not None and code == 0:
        code = _output_lost(reason)
    sys.exit(code)


def _main() -> int:
    """Parse the command line and run what it asks for; returns the exit code."""
    try:
        start = _parsed()
        return run(start) if isinstance(start, Start) else int(start or 0)
    except click.ClickException as problem:
        streams.say(f"{NAME}: {problem.format_message()}")
        return problem.exit_code
    except click.Abort as problem:
        cause = problem.__cause__
        return _interrupted(cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt())
    except (BrokenPipeError, streams.OutputLost) as problem:
        return _stopped_by_output(problem)


def _parsed() -> Any:
    """What the command line asks for, or an exit code after --help and --version."""
    try:
        # Not standalone: Click would turn Ctrl-C into exit code 1, and print its usage lines
        # around what shall be one sentence.
        words = serving.of_mlx_fun(sys.argv[1:]) or sys.argv[1:]
        start = _one_shot(words)
        return shell.main(words, NAME, standalone_mode=False) if start is None else start
    except BrokenPipeError:
        raise
    except OSError as problem:  # all that is written meanwhile is Click's help
        raise streams.OutputLost(problem.strerror or str(problem)) from None


if __name__ == "__main__":
    main()
