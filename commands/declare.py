"""The `@command` decorator: a command is one decorated function, its docstring the help page.

    @command("undo", group="history", key="u", when=undoable)
    def undo(call: Call) -> Report:
        '''Take the last edit back, bit for bit.'''
        return call.session.undo()

Click does the parsing, validation and completion; its decorators go below `@command`. A parameter's
name is the field it fills in an options dataclass wherever there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import click

from commands.types import FilePath, Seed, Source
from mlxfun.data.demo import DATASETS
from mlxfun.data.options import DatasetOptions
from mlxfun.report import Report
from mlxfun.session.reports import SessionView

if TYPE_CHECKING:
    from commands.ports import SessionPort
    from commands.workbench import Workbench
    from mlxfun.context import Context

Params = dict[str, Any]
Handler = Callable[["Call"], Report]
When = Callable[[SessionView], str | None]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

GROUPS = ("model", "observe", "edit", "measure", "chat", "history", "shell")

DATASET = Source("dataset", {f"demo:{k}": v for k, v in DATASETS.items()}, (".jsonl",))


def always(_view: SessionView) -> str | None:
    """Applies to every state."""
    return None


def with_model(view: SessionView) -> str | None:
    """Needs a resident model."""
    return None if view.model else "no model is loaded: type load PATH, or load demo"


def with_stats(view: SessionView) -> str | None:
    """Needs routing statistics."""
    if view.model and not (view.heat and view.heat.samples):
        return "no statistics yet: run collect first"
    return with_model(view)


def staged(view: SessionView) -> str | None:
    """Needs a staged plan."""
    return with_model(view) or (None if view.plan else "nothing is staged: run prune first")


def steered(view: SessionView) -> str | None:
    """Needs steering in force."""
    now = view.steering
    active = now is not None and (any(now.activated.values()) or any(now.deactivated.values()))
    return with_model(view) or (None if active else "nothing is steered: run steer first")


def undoable(view: SessionView) -> str | None:
    """Needs a parent of the current history node."""
    history = view.history
    here = {n.id: n.parent for n in history.nodes}.get(history.current) if history else None
    return with_model(view) or (None if here is not None else "nothing to undo")


def redoable(view: SessionView) -> str | None:
    """Needs a child of the current history node."""
    history = view.history
    below = history is not None and any(n.parent == history.current for n in history.nodes)
    return with_model(view) or (None if below else "nothing to redo")


def pruned(view: SessionView) -> str | None:
    """Needs a model that an applied edit made smaller."""
    model = view.model
    fewer = model is not None and model.experts_kept < model.experts
    return with_model(view) or (None if fewer else "no applied prune to compact")


def listable(view: SessionView) -> str | None:
    """Needs experts that go or are gone."""
    if staged(view) is None or pruned(view) is None:
        return None
    return with_model(view) or "nothing is staged or pruned: run prune first"


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a command: `call["path"]` is a parameter, as parsed."""

    bench: Workbench
    params: Params
    ctx: Context

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    @property
    def session(self) -> SessionPort:
        """The resident model. Raises StateError when there is none."""
        return self.bench.session


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    name: one or two words. danger: it loses something that undo does not bring back. undoable:
    undo takes it back. key: the default key. when: why it does not apply to a view, None if it
    does. instant: answered at once, also while the worker is busy. between: may run between two
    tokens of an answer. recorded: belongs in a session file. outside: it writes files and leaves
    the session as it was, so that bringing a session back passes it over.
    """

    name: str
    group: str
    handler: Handler
    click: click.Command
    danger: bool = False
    undoable: bool = False
    key: str | None = None
    when: When = with_model
    instant: bool = False
    between: bool = False
    recorded: bool = True
    outside: bool = False

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
        """The command with its arguments; options in brackets when there are few."""
        parts = [self.name]
        options = [p for p in self.click.params if isinstance(p, click.Option)]
        arguments = [p for p in self.click.params if isinstance(p, click.Argument)]
        if options:
            parts.append("[OPTIONS]")
        for argument in arguments:
            text = argument.make_metavar(click.Context(self.click))
            parts.append(text)
        return " ".join(parts)

    @property
    def tail(self) -> bool:
        """Whether the last argument is free text, taken as it stands."""
        return any(_is_text(p) for p in self.click.params)


def _is_text(p: click.Parameter) -> bool:
    """Whether a parameter takes the rest of the line as text; a list of paths does not."""
    return isinstance(p, click.Argument) and p.nargs == -1 and not isinstance(p.type, FilePath)


class Traits(TypedDict, total=False):
    """The optional fields of `Command`; by default it needs a model and is recorded."""

    danger: bool
    undoable: bool
    key: str
    when: When
    instant: bool
    between: bool
    recorded: bool
    outside: bool


def command(
    name: str, *, group: str, parser: type[click.Command] = click.Command, **traits: Unpack[Traits]
) -> Callable[[Handler], Command]:
    """Declare a command; see `Command` for the fields. parser: reads its words."""

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
    """Several options as one decorator, in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


positive = click.IntRange(min=1)

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


def dataset_options(source: str, params: Params, seed: int) -> DatasetOptions:
    """The values of `data_options` for one source; `seed` where none was given."""
    given = {
        key: params[key]
        for key in ("text_key", "max_samples", "max_tokens")
        if params[key] is not None
    }
    return DatasetOptions(source, seed=seed if params["seed"] is None else params["seed"], **given)
