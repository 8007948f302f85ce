"""The `@command` decorator: a command is one decorated function, its docstring the help page.

    @command("undo", group="history", key="u", when=undoable)
    def undo(call: Call) -> Report:
        '''Take the last edit back, bit for bit.'''
        return call.session.undo(call.ctx)

Click does the parsing, validation and completion; its decorators go below `@command`. A parameter's
name is the field it fills in an options dataclass wherever there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import click

from commands.conditions import Condition, with_model
from commands.types import FilePath, Seed, Source, Whole, Words
from mlxfun.data.demo import DATASETS
from mlxfun.data.options import RECORD_SUFFIXES, DatasetOptions, Weighted, mixed
from mlxfun.report import Report

if TYPE_CHECKING:
    from commands.workbench.workbench import Workbench
    from mlxfun.context import Context
    from mlxfun.session.session import Session

Params = dict[str, Any]
Handler = Callable[["Call"], Report]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

Group = Literal["model", "observe", "edit", "measure", "chat", "history", "shell"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""The groups of commands, in the order of help."""

STEADY = (
    "info",
    "layers",
    "smoke-test",
    "history",
    "name",
    "plan show",
    "set",
    "record",
    "expect",
    "workers",
    "models",
)
"""Commands of other groups that change neither weights nor steering."""

DATASET = Source("dataset", {f"demo:{k}": v for k, v in DATASETS.items()}, RECORD_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Call:
    """One invocation of a command: `call["path"]` is a parsed parameter."""

    bench: Workbench
    params: Params
    ctx: Context

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    @property
    def session(self) -> Session:
        """The resident model. Raises StateError when there is none."""
        return self.bench.session


@dataclass(frozen=True, slots=True)
class Command:
    """A declared command.

    name: one or two words. danger: what it removes cannot be restored by undo. undoable: undo
    reverts it. key: the default key. when: the condition under which it applies. instant: answered
    at once, also while the worker is busy. between: may run between two tokens of an answer.
    recorded: written to session files. read_only: it leaves the session as it was, whatever files
    it writes, so that `resume` skips it.
    """

    name: str
    group: Group
    handler: Handler
    click: click.Command
    danger: bool = False
    undoable: bool = False
    key: str | None = None
    when: Condition = with_model
    instant: bool = False
    between: bool = False
    recorded: bool = True
    read_only: bool = False

    @property
    def steady(self) -> bool:
        """Whether weights and steering are, after it, what they were before it: answers to clients
        of a server may go on afterwards."""
        looks = self.group in ("observe", "measure", "chat") and not self.danger
        return looks or self.read_only or self.name in STEADY

    @property
    def help(self) -> str:
        """The whole help text; its first line says what the command does."""
        return inspect.cleandoc(self.handler.__doc__ or "")

    @property
    def short(self) -> str:
        """The first line of the help, without its full stop."""
        return self.help.partition("\n")[0].rstrip(".")

    @property
    def usage(self) -> str:
        """The command line as a pattern: name, required options, [OPTIONS] for others, arguments."""
        parts, context = [self.name], click.Context(self.click)
        options = [p for p in self.click.params if isinstance(p, click.Option)]
        arguments = [p for p in self.click.params if isinstance(p, click.Argument)]
        named = [p for p in options if p.required or isinstance(p, Needed)]
        parts += [f"{p.opts[0]} {p.make_metavar(context)}" for p in named]
        if len(named) < len(options):
            parts.append("[OPTIONS]")
        parts += [argument.make_metavar(context) for argument in arguments]
        return " ".join(parts)

    @property
    def tail(self) -> bool:
        """Whether the last argument is free text, which is not parsed further."""
        return any(_is_text(p) for p in self.click.params)


def _is_text(p: click.Parameter) -> bool:
    """Whether a parameter takes the rest of the line as text; a list of paths does not."""
    return (
        isinstance(p, click.Argument)
        and p.nargs == -1
        and not isinstance(p.type, FilePath | Source | Words)
    )


class Traits(TypedDict, total=False):
    """The optional fields of `Command`; by default it needs a model and is recorded."""

    danger: bool
    undoable: bool
    key: str
    when: Condition
    instant: bool
    between: bool
    recorded: bool
    read_only: bool


def command(
    name: str,
    *,
    group: Group,
    parser: type[click.Command] = click.Command,
    **traits: Unpack[Traits],
) -> Callable[[Handler], Command]:
    """Declare a command; see `Command` for the traits. parser: the Click class that parses it."""

    def declare(handler: Handler) -> Command:
        params = list(reversed(getattr(handler, "__click_params__", [])))
        tail = any(_is_text(p) for p in params)
        built = parser(
            name,
            params=params,
            help=inspect.cleandoc(handler.__doc__ or ""),
            add_help_option=False,  # Click's would print; "--help" is answered by the engine
            # Free text may hold words that look like options: they end where the text begins.
            context_settings={"allow_interspersed_args": not tail},
        )
        return Command(name, group, handler, built, **traits)

    return declare


def stack(*decorators: Decorator) -> Decorator:
    """Combine option decorators into one; options appear in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


positive = Whole(min=1)


class Needed(click.Option):
    """An option without which its command does nothing, but which Click must not demand: another one
    replaces it. unless: names of parameters that do.

    The command itself says what is missing, in its own words; forms and usage lines name the option.
    """

    def __init__(self, *args: Any, unless: tuple[str, ...] = (), **more: Any) -> None:
        super().__init__(*args, **more)
        self.unless = unless


def data_option(name: str, text: str, **more: Any) -> Decorator:
    """An option that names data sets: repeatable, each with a weight if need be (a.jsonl:2)."""
    return click.option(name, type=DATASET, multiple=True, help=f"{text} Repeatable.", **more)


data_options = stack(
    click.option(
        "--text-key", metavar="KEY", help="JSON key of plain text lines (default: content)."
    ),
    click.option("--max-samples", type=positive, metavar="N", help="Use N lines (default: all)."),
    click.option(
        "--max-tokens", type=positive, metavar="N", help="Cut a line after N tokens (default: 512)."
    ),
    click.option(
        "--seed", type=Seed(), metavar="N", help="Which lines are drawn (default: --seed)."
    ),
)


DATA_NAMES = ("dataset", "text_key", "max_samples", "max_tokens", "seed")
"""The parameters of `--dataset` and `data_options`, which together make a DatasetOptions."""


def count_option(name: str, text: str, default: int | None = None, least: int = 1) -> Decorator:
    """An option that takes a number of things. default None: none, or what `text` says."""
    said = text if default is None else f"{text} (default: {default})."
    kind = Whole(min=least)
    return click.option(name, type=kind, default=default, metavar="N", help=said)


def dataset_options(sources: Weighted, params: Params, seed: int) -> DatasetOptions:
    """The `data_options` of a command for its sources. seed: used if --seed was not given."""
    given = {
        key: params[key]
        for key in ("text_key", "max_samples", "max_tokens")
        if params[key] is not None
    }
    return mixed(sources, seed=seed if params["seed"] is None else params["seed"], **given)
