"""The form of a command: a field for each parameter, read off the declaration of the command.

A form and a command line say the same. `form_of` reads a line into fields, `filled_in` changes one
parameter of a line and leaves everything else as it was typed, also the order of the options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import click

from commands.completion import Completion, complete, last_word, quoted
from commands.declare import Command, Needed
from commands.registry import FAMILIES, parse, resolve, split
from mlxfun.errors import UsageError
from mlxfun.session.reports import SessionView

FieldKind = Literal["flag", "choice", "text"]
ON, OFF = "on", "off"
"""Values of a flag that is given, and of one whose opposite is given; "" for neither."""


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter.

    name: the parameter's. label: as written on a command line. many: takes several words. choices:
    all values of a choice or a flag. default: used while it is empty, "" for none that is a value.
    value: as typed; problem: what is wrong with it, "" for nothing.
    """

    name: str
    label: str
    kind: FieldKind
    required: bool
    many: bool
    choices: tuple[str, ...]
    default: str
    help: str
    value: str
    problem: str


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a line. fields: required ones first. problem: of the line as a whole, or ""."""

    command: str
    about: str
    fields: tuple[Field, ...]
    problem: str

    @property
    def complete(self) -> bool:
        """Whether the line can be run."""
        return not self.problem and not any(field.problem for field in self.fields)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Words of a line that give one parameter a value. param None: words that belong to none."""

    param: click.Parameter | None
    words: tuple[str, ...]
    value: str


def form_of(line: str) -> Form | None:
    """The form of a command line, None for what is no command or has no fields."""
    found = _command(line)
    if found is None:
        return None
    command, words = found
    problem, pieces = "", list[_Piece]()
    try:
        pieces = list(_pieces(command, split(" ".join(["x", words]))[1:]))
    except UsageError as error:
        problem = _short(command, error)
    fields = tuple(_field(command, param, pieces) for param in _in_order(command))
    if not problem and not any(field.problem for field in fields):
        problem = _whole(command, line)
    return Form(command.name, command.short, fields, problem)


def filled_in(line: str, name: str, text: str) -> str:
    """`line` with another value for the parameter `name`; "" takes it out.

    text: one word as it stands, or for a parameter that takes several, words as in a command line.

    Raises UsageError for a quote that is not closed, and for a line that is no command's.

    >>> filled_in("prune --n-prune 4 --metric reap", "n_prune", "8")
    'prune --n-prune 8 --metric reap'
    """
    found = _command(line)
    if found is None:
        raise UsageError(f"{line!r} has no form")
    command, rest = found
    pieces = list(_pieces(command, split(f"x {rest}")[1:]))
    param = next(p for p in command.click.params if p.name == name)
    made = [_made(param, value) for value in _values(param, text)]
    places = [n for n, piece in enumerate(pieces) if piece.param is param]
    if len(places) == len(made):
        # Several of one option may each belong to the option before them.
        for place, piece in zip(places, made, strict=True):
            pieces[place] = piece
    else:
        first = places[0] if places else len(pieces)
        kept = [piece for piece in pieces if piece.param is not param]
        first = min(first, len(kept))
        pieces = [*kept[:first], *made, *kept[first:]]
    return _line(command, pieces)


def completions(line: str, name: str, text: str, view: SessionView) -> list[Completion]:
    """The completions of one field of the form of `line`: replace `text[start:]` by each."""
    found = _command(line)
    param = None if found is None else _param(found[0], name)
    if found is None or param is None:
        return []
    command, many = found[0], _many(param)
    start, word = last_word(text) if many else (0, text)
    try:
        before = _line(command, _others(command, found[1], param))
    except UsageError:
        before = command.name
    lead = f"{param.opts[0]} " if isinstance(param, click.Option) else ""
    known = complete(f"{before} {lead}{quoted(word)}", view)
    if not word and any(o.text.startswith("-") for o in known):
        return []  # the options, where no more words are wanted
    return [Completion(o.text if many else _bare(o.text), start, o.hint) for o in known]


def _others(command: Command, rest: str, param: click.Parameter) -> list[_Piece]:
    """The pieces of a line without those of `param`, and of arguments only those before it."""
    arguments = [p for p in command.click.params if isinstance(p, click.Argument)]
    later = arguments[arguments.index(param) :] if param in arguments else [param]
    pieces = _pieces(command, split(f"x {rest}")[1:])
    return [p for p in pieces if p.param is not None and p.param not in later]


def _command(line: str) -> tuple[Command, str] | None:
    """The command of a line and the text behind its name, None for one without a form."""
    words = line.split(None, 2)
    if not words or (len(words) == 1 and words[0] in FAMILIES):
        return None
    try:
        command, _ = resolve([word for word in words[:2] if not word.startswith("-")] or words[:1])
    except UsageError:
        return None
    taken = 2 if " ".join(words[:2]) == command.name else 1
    rest = line.split(None, taken)[taken:]
    return (command, rest[0] if rest else "") if has_form(command) else None


def has_form(command: Command) -> bool:
    """Whether a command has fields: free text is better typed on the command line."""
    return bool(command.click.params) and not command.tail


def _param(command: Command, name: str) -> click.Parameter | None:
    return next((p for p in command.click.params if p.name == name), None)


def _in_order(command: Command) -> list[click.Parameter]:
    """Arguments, required options, then the others, each in the order of the declaration."""

    def rank(param: click.Parameter) -> tuple[bool, bool]:
        return not isinstance(param, click.Argument), not _required(param, ())

    return sorted(command.click.params, key=rank)


def _pieces(command: Command, words: Sequence[str]) -> Iterator[_Piece]:
    """The words of a line by parameter. Raises UsageError as Click would."""
    options = {
        name: p
        for p in command.click.params
        if isinstance(p, click.Option)
        for name in (*p.opts, *p.secondary_opts)
    }
    arguments = [p for p in command.click.params if isinstance(p, click.Argument)]
    waiting, ended = list(words), False
    while waiting:
        word = waiting.pop(0)
        if word == "--" and not ended:
            ended = True
        elif word.startswith("-") and len(word) > 1 and not ended:
            name, equals, value = word.partition("=")
            option = options.get(name)
            if option is None:
                raise UsageError(f"no such option {name}")
            if option.is_flag:
                yield _Piece(option, (name,), OFF if name in option.secondary_opts else ON)
                continue
            if not equals and not waiting:
                raise UsageError(f"{name} needs a value")
            value = value if equals else waiting.pop(0)
            yield _Piece(option, (name, value), value)
        else:
            yield _Piece(arguments[0] if arguments else None, (word,), word)
            if arguments and arguments[0].nargs != -1:
                arguments.pop(0)


def _line(command: Command, pieces: Sequence[_Piece]) -> str:
    arguments = [p for p in pieces if not isinstance(p.param, click.Option)]
    if any(p.value.startswith("-") and len(p.value) > 1 for p in arguments):
        options = [p for p in pieces if isinstance(p.param, click.Option)]
        words = [w for p in options for w in p.words] + ["--"] + [p.value for p in arguments]
    else:
        # Arguments in the order of the declaration, whichever was filled in first.
        order = command.click.params
        named = iter(
            sorted(arguments, key=lambda p: order.index(p.param) if p.param else len(order))
        )
        words = [
            w
            for p in pieces
            for w in (p if isinstance(p.param, click.Option) else next(named)).words
        ]
    return " ".join([command.name, *map(quoted, words)])


def _values(param: click.Parameter, text: str) -> list[str]:
    """The values that the text of a field stands for."""
    if not text.strip():
        return []
    if not _many(param):
        return [text.strip()]
    try:
        return split(f"x {text}")[1:]
    except UsageError as error:
        raise UsageError(str(error).partition(": ")[2].partition(" in ")[0]) from None


def _made(param: click.Parameter, value: str) -> _Piece:
    if not isinstance(param, click.Option):
        return _Piece(param, (value,), value)
    if param.is_flag:
        names = param.secondary_opts if value == OFF and param.secondary_opts else param.opts
        return _Piece(param, (names[0],), value)
    return _Piece(param, (param.opts[0], value), value)


def _field(command: Command, param: click.Parameter, pieces: Sequence[_Piece]) -> Field:
    given = [piece.value for piece in pieces if piece.param is param]
    many, required = _many(param), _required(param, pieces)
    option = isinstance(param, click.Option)
    context = click.Context(command.click, info_name=command.name)
    default = "" if many or param.default in (None, False) else _default(param)
    return Field(
        name=param.name or "",
        label=param.opts[0] if option else param.make_metavar(context).strip("[].").rstrip("."),
        kind=_kind(param),
        required=required,
        many=many,
        choices=_choices(param),
        default=default,
        help=(param.help or "") if isinstance(param, click.Option) else _about(command),
        value=" ".join(map(quoted, given)) if many else (given[-1] if given else ""),
        problem=_problem(context, param, given) or ("" if given or not required else "required"),
    )


def _about(command: Command) -> str:
    """What the help page says behind its first line: arguments have no help of their own."""
    return " ".join(command.help.partition("\n")[2].split())


def _required(param: click.Parameter, pieces: Sequence[_Piece]) -> bool:
    """Whether a line with these pieces must have the parameter."""
    if not isinstance(param, Needed):
        return param.required
    return not any(p.param is not None and p.param.name in param.unless for p in pieces)


def _default(param: click.Parameter) -> str:
    return str(param.default) if isinstance(param.default, str | int | float) else ""


def _many(param: click.Parameter) -> bool:
    return param.nargs == -1 or bool(param.multiple)


def _kind(param: click.Parameter) -> FieldKind:
    if isinstance(param, click.Option) and param.is_flag:
        return "flag"
    return "choice" if _choices(param) and not _many(param) else "text"


def _choices(param: click.Parameter) -> tuple[str, ...]:
    if isinstance(param, click.Option) and param.is_flag:
        return (ON, OFF) if param.secondary_opts else (ON,)
    return tuple(map(str, param.type.choices)) if isinstance(param.type, click.Choice) else ()


def _problem(context: click.Context, param: click.Parameter, given: Sequence[str]) -> str:
    """What Click says of the values of one parameter, "" if it takes them."""
    if isinstance(param, click.Option) and param.is_flag:
        return ""
    opts = {param.name: list(given) if _many(param) else given[-1]} if given else {}
    try:
        param.handle_parse_result(context, opts, [])
    except click.MissingParameter:
        return "required"
    except click.UsageError as problem:
        return problem.message.rstrip(".")
    return ""


def _whole(command: Command, line: str) -> str:
    try:
        parse(line)
    except UsageError as error:
        return _short(command, error)
    return ""


def _short(command: Command, error: UsageError) -> str:
    """The sentence of an error, without the command's name in front."""
    return str(error).removeprefix(f"{command.name}: ").removeprefix("x: ")


def _bare(text: str) -> str:
    """A completion as one word without quotes."""
    return (split(f"x {text}")[1:] or [""])[0]
