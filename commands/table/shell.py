"""The shell itself: `set`, `record`, `replay`, `resume`, `expect`, `help`, `quit`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import click
from click.shell_completion import CompletionItem

from commands.conditions import always, served
from commands.declare import DATASET, Call, Command, command, positive
from commands.guides.index import GUIDES
from commands.guides.report import GuideReport
from commands.scripts import expect as expectations
from commands.scripts import resume
from commands.scripts.replay import run_script
from commands.types import FilePath, Number, Seed
from commands.workbench.settings import Settings
from commands.workbench.wiring import ServeAction
from mlxfun.calibration.options import METRICS
from mlxfun.errors import UsageError
from mlxfun.report import Report, TextReport


class OptionalLimit(Number):
    """A number above 0, or off."""

    name = "number or off"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return OFF if value in ("off", OFF) else super().convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        return [CompletionItem("off")] if "off".startswith(incomplete) else []


OFF = object()
"""The value of a limit that is taken away; None means that no value was typed."""

SETTING_TYPES: dict[str, click.ParamType[Any]] = {
    "seed": Seed(),
    "dataset": DATASET,
    "metric": click.Choice(METRICS),
    "temperature": Number(min=0),
    "top-p": Number(0, 1, min_open=True),
    "max-tokens": positive,
    "max-kl": OptionalLimit(),
    "max-perplexity-ratio": OptionalLimit(),
    "max-loops": OptionalLimit(),
    "undo-steering": click.Choice(("on", "off")),
}


@dataclass(frozen=True, slots=True)
class QuitReport(Report):
    """Asks the front end to end."""

    kind: ClassVar[str] = "quit"

    def summary(self) -> str:
        return "bye"


@dataclass(frozen=True, slots=True)
class SettingsReport(Report):
    """The shell options in force."""

    kind: ClassVar[str] = "settings"
    settings: dict[str, Any]

    def summary(self) -> str:
        return ", ".join(f"{name} {_as_typed(value)}" for name, value in self.settings.items())


def _as_typed(value: Any) -> str:
    """A setting as `set` takes it; a data set that was never named is none."""
    if value is None:
        return "off"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class RecordReport(Report):
    """A change of the recording. path: its file, None for none. moved: the older file's new name."""

    kind: ClassVar[str] = "record"
    path: str | None
    action: Literal["recording to", "recorded"]
    moved: str | None = None

    def summary(self) -> str:
        text = f"{self.action} {self.path}" if self.path else "nothing is being recorded"
        return f"{text} (the older recording is now {self.moved})" if self.moved else text


class _Value(click.ParamType[Any]):
    """The value of `set`: converts and completes as the named option would."""

    name = "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        kind = SETTING_TYPES.get((ctx.params.get("name") or "") if ctx is not None else "")
        return kind.convert(value, param, ctx) if kind else value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        kind = SETTING_TYPES.get(ctx.params.get("name") or "")
        return kind.shell_complete(ctx, param, incomplete) if kind else []


class _HelpName(click.ParamType[str]):
    """Completes as the first word of a line does, then with the guides."""

    name = "command"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        root = ctx.find_root()
        if ctx is root or ctx.params.get("name"):
            return []
        found = [g for g in GUIDES.values() if g.name.startswith(incomplete)]
        commands = root.command.shell_complete(root, incomplete)
        return [*commands, *(CompletionItem(g.name, help=g.summary) for g in found)]


@command("set", group="shell", when=always)
@click.argument("name", required=False, type=click.Choice(list(SETTING_TYPES)), metavar="[NAME]")
@click.argument("value", required=False, type=_Value())
def set_option(call: Call) -> Report:
    """Set a default for the options of later commands; alone, list them.

    seed, dataset, metric, temperature, top-p, max-tokens (of chat); max-kl and
    max-perplexity-ratio, max-loops, the guardrails of apply, a number or off; undo-steering, on or off:
    whether undo takes steering back too.
    """
    name, value = call["name"], call["value"]
    if name is not None:
        if value is None:
            raise UsageError(f"set: give the value too: set {name} VALUE")
        if name == "undo-steering":
            value = value == "on"
        changed: dict[str, Any] = {name.replace("-", "_"): None if value is OFF else value}
        call.bench.change(replace(call.bench.settings, **changed))
    return settings_report(call.bench.settings)


def settings_report(settings: Settings) -> SettingsReport:
    """The settings under the names that `set` takes."""
    return SettingsReport(
        {f.name.replace("_", "-"): getattr(settings, f.name) for f in fields(settings)}
    )


@command("record", group="shell", when=always, recorded=False)
@click.argument("path", required=False, type=FilePath())
@click.option("--stop", is_flag=True, help="Stop recording.")
def record(call: Call) -> Report:
    """Write the session to a file that replay runs, including everything done so far."""
    path: Path | None = call["path"]
    if call["stop"] and path is not None:
        raise UsageError("record: give a file, or --stop, not both")
    if call["stop"]:
        stopped = call.bench.journal.detach()
        return RecordReport(str(stopped) if stopped else None, "recorded")
    if path is not None:
        moved = call.bench.journal.attach(call.bench.writable(path))
        return RecordReport(
            str(call.bench.journal.path), "recording to", str(moved) if moved else None
        )
    current = call.bench.journal.path
    return RecordReport(str(current) if current else None, "recording to")


@command("replay", group="shell", danger=True, when=always, recorded=False)
@click.argument("path", type=FilePath((".mlxfun",)))
@click.option("--keep-going", is_flag=True, help="Continue after a command that fails.")
def replay(call: Call) -> Report:
    """Run a session file, checking the model's state after each command.

    Loads the model that the file names if none is loaded. Stops at the first difference. What it
    saves is written below --output-root, by default a temporary directory.
    """
    return run_script(
        call.bench, call["path"], call["keep_going"] or call.bench.keep_going, call.ctx
    )


@command("resume", group="shell", danger=True, when=always, recorded=False)
@click.argument("path", required=False, type=FilePath((".mlxfun",)))
@click.option("--drop", is_flag=True, help="Forget the session instead; PATH is then its name.")
def resume_session(call: Call) -> Report:
    """Bring back the session that was cut short by a crash, a kill or a lost connection.

    Its commands run again and every state is compared; calibrations are not repeated, and files
    are not written again. Start mlxfun-shell --resume, or use it before anything else. With --drop
    only a session that was cut short can be named, without its directory.
    """
    bench, path = call.bench, call["path"]
    if not call["drop"]:
        return resume.resume(bench, path, call.ctx)
    return TextReport(f"forgot the session {resume.forget(bench, path and str(path))}")


def _parse_expectation(
    ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]
) -> expectations.Expectation | None:
    """Parse at parsing time, so that a malformed line is refused before its script runs."""
    if ctx.resilient_parsing:
        return None
    try:
        return expectations.parse_expectation(" ".join(words))
    except UsageError as problem:
        raise click.UsageError(str(problem)) from None


@command("expect", group="shell", when=always)
@click.argument("expectation", nargs=-1, required=True, callback=_parse_expectation)
def expect(call: Call) -> Report:
    """Check the last report: expect perplexity.all <= 14.2, expect ok, expect error TEXT.

    The path leads into the report's data (as --json shows it), or is state for the model's state.
    Operators: <= >= == != < >.
    """
    data = None
    if call.bench.last is not None:
        data = {
            **call.bench.last.data(),
            "kind": call.bench.last.kind,
            "state": call.bench.recorded_name(call.bench.view().state),
        }
    return TextReport(expectations.check(call["expectation"], data, call.bench.last_error))


@command("serve", group="shell", when=served, instant=True, recorded=False, read_only=True)
@click.argument("action", type=click.Choice(get_args(ServeAction)), default="show")
def serve(call: Call) -> Report:
    """Show the server beside the shell (--serve), hold clients back, or stop it.

    show: requests in flight, what each client has had, what went wrong. pause: new requests wait,
    those in flight go on. drain: new ones are refused with 503, the others are answered. resume:
    answer again. stop: drain, then close the server; the shell goes on.
    """
    return call.bench.served().act(call["action"])


@command("help", group="shell", key="f1", when=always, instant=True, recorded=False)
@click.argument("name", nargs=-1, type=_HelpName())
def help_page(call: Call) -> Report:
    """Explain a command or show a guide; alone, list them all."""
    name = " ".join(call["name"])
    text = call.bench.wiring.help_text(name or None)
    return GuideReport(text, name) if name in GUIDES else TextReport(text)


@command("quit", group="shell", key="ctrl+q", when=always, instant=True, recorded=False)
def quit_shell(_call: Call) -> Report:
    """End the session; what was not saved is lost."""
    return QuitReport()


COMMANDS: tuple[Command, ...] = (
    set_option,
    record,
    replay,
    resume_session,
    expect,
    serve,
    help_page,
    quit_shell,
)
