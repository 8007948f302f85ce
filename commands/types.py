"""Argument types: how a word of a command line is converted, and how it is completed.

Completion gets the present `SessionView` as the Click context's `obj`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlxfun.data.options import ExpertSets, require_seed
from mlxfun.errors import UsageError
from mlxfun.session.reports import SessionView
from mlxfun.text import shown

MAX_COMPLETIONS = 200
MAX_NAMED = 1_000_000  # experts in one word

_LETTERS = re.compile(r"[Ll](\d+):[Ee]?(?=\d)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\Z", re.IGNORECASE)

Items = list[CompletionItem[Any]]


def parse_experts(text: str) -> tuple[int, ...]:
    """See `mlxfun.data.expert_notation.parse_experts`."""
    from mlxfun.data.expert_notation import parse_experts

    return parse_experts(text)


def parse_expert_pairs(text: str) -> ExpertSets:
    """See `mlxfun.data.expert_notation.parse_expert_pairs`; reports write L3:E7, so that is read too.

    >>> parse_expert_pairs("L3:E7,5:0..2")
    {3: (7,), 5: (0, 1, 2)}
    """
    from mlxfun.data.expert_notation import parse_expert_pairs

    return parse_expert_pairs(_LETTERS.sub(r"\1:", text))


class _Parsed(click.ParamType[Any]):
    """A type whose conversion is one function that raises an error with a sentence."""

    @staticmethod
    def parse(text: str) -> Any:
        raise NotImplementedError

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except (ValueError, UsageError) as problem:
            self.fail(str(problem), param, ctx)


class Experts(_Parsed):
    """`"0,1,250..255"` -> (0, 1, 250, ...)."""

    name = "experts"
    parse = staticmethod(parse_experts)


class _ExpertList(_Parsed):
    """A type that is a list of layer:expert, separated by commas; completes the last one."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + item) for item in _cells(ctx.obj, last)]


class ExpertPairs(_ExpertList):
    """`"3:7,5:0..2"` -> {3: (7,), 5: (0, 1, 2)}."""

    name = "L:E,..."
    parse = staticmethod(parse_expert_pairs)


class Levels(_ExpertList):
    """`"3:7=1.5,5:0..2=-0.5"` -> {3: {7: 1.5}, 5: {0: -0.5, 1: -0.5, 2: -0.5}}."""

    name = "L:E=X,..."

    @staticmethod
    def parse(text: str) -> dict[int, dict[int, float]]:
        found: dict[int, dict[int, float]] = {}
        named = 0
        for piece in text.split(","):
            names, equals, value = piece.partition("=")
            try:
                level = float(value)
            except ValueError:
                level = math.nan
            if not equals or not math.isfinite(level):
                raise ValueError(
                    f"{shown(piece.strip())} in {shown(text)} is not L:E=X, such as 3:7=1.5"
                )
            for layer, experts in parse_expert_pairs(names).items():
                named += len(experts)
                if named > MAX_NAMED:
                    raise ValueError(f"more than {MAX_NAMED:,} experts are named")
                found.setdefault(layer, {}).update(dict.fromkeys(experts, level))
        return found


class OneExpert(_Parsed):
    """`"3:7"` or `"L3:E7"` -> (3, 7)."""

    name = "L:E"

    @staticmethod
    def parse(text: str) -> tuple[int, int]:
        sets = parse_expert_pairs(text)
        cells = [(layer, e) for layer, experts in sets.items() for e in experts]
        if len(cells) != 1:
            raise ValueError(
                f"{shown(text)} names {len(cells)} experts: give one, for instance 3:7"
            )
        return cells[0]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return [CompletionItem(item) for item in _cells(ctx.obj, incomplete)]


def _cells(view: SessionView | None, incomplete: str) -> list[str]:
    """Completions of one layer:expert: layers as "3:", then that layer's experts that are kept."""
    if view is None or view.heat is None:
        return []
    heat = view.heat
    layer, colon, expert = incomplete.partition(":")
    if not colon:
        return [f"{n}:" for n in heat.layers if str(n).startswith(layer)]
    if not layer.isdigit() or int(layer) not in heat.layers:
        return []
    alive = heat.alive[heat.layers.index(int(layer))]
    return [f"{layer}:{e}" for e in range(heat.experts) if alive[e] and str(e).startswith(expert)][
        :MAX_COMPLETIONS
    ]


class Size(_Parsed):
    """`"2GiB"`, `"500 MB"`, `"1.5g"`, `"4096"` -> bytes. Without the i, powers of 1000."""

    name = "size"

    @staticmethod
    def parse(text: str) -> int:
        match = _SIZE.match(text.strip())
        if match is None:
            raise ValueError(f"{shown(text)} is not a size, for instance 500MB, 2GiB or 4096")
        power = " kmgt".index(match[2].lower() or " ")
        size = float(match[1]) * (1024 if match[3] else 1000) ** power
        if size >= 2**63:
            raise ValueError(f"{shown(text, 40)} is more than any machine holds")
        return int(size)


class SavedSize(Size):
    """A `Size` that a saved model may take, so more than no bytes."""

    @staticmethod
    def parse(text: str) -> int:
        size = Size.parse(text)
        if size == 0:
            raise ValueError(f"{shown(text)} leaves no room for a model; give a size such as 500MB")
        return size


class FigureSize(_Parsed):
    """`"180x90"` -> (180.0, 90.0) and `"85"` -> (85.0, None), millimetres."""

    name = "WxH"
    least, most = 20, 2000

    @classmethod
    def parse(cls, text: str) -> tuple[float, float | None]:
        sides = text.strip().lower().removesuffix("mm").split("x")
        try:
            found = [float(side) for side in sides]
        except ValueError:
            found = []
        if len(found) not in (1, 2) or not all(cls.least <= side <= cls.most for side in found):
            raise ValueError(
                f"{shown(text, 40)} is no size: give millimetres from {cls.least} to {cls.most}, "
                "WIDTH or WIDTHxHEIGHT, such as 180x90"
            )
        return found[0], found[1] if len(found) == 2 else None


class HowMuch(_Parsed):
    """`"auto"`, `"all"`, `"none"`, or a size as bytes."""

    name = "resident"
    words = ("auto", "all", "none")

    @classmethod
    def parse(cls, text: str) -> str | int:
        if text in cls.words:
            return text
        try:
            return Size.parse(text)
        except ValueError:
            known = ", ".join(cls.words)
            raise ValueError(f"{shown(text)} is none of {known}, and no size like 20GiB") from None


class Whole(click.IntRange):
    """A whole number within bounds; click.IntRange calls it an "integer range" in its errors."""

    name = "integer"


class Number(click.FloatRange):
    """A finite number within bounds; click.FloatRange accepts infinity and NaN."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Rise(_Parsed):
    """`"+10%"` -> 0.1, by what fraction of itself something shall rise."""

    name = "rise"

    @staticmethod
    def parse(text: str) -> float:
        found = re.fullmatch(r"\+?(\d{1,6}(\.\d+)?) ?%", text.strip())
        if found is None or float(found[1]) == 0:
            raise ValueError(f"{shown(text, 40)} is no rise; write it as +10%")
        return float(found[1]) / 100


class Seed(_Parsed):
    """`"7"` -> 7, a seed that every generator takes."""

    name = "seed"

    @staticmethod
    def parse(text: str) -> int:
        try:
            return require_seed(int(text))
        except ValueError:  # also of a number with thousands of digits
            raise ValueError(f"{shown(text, 40)} is not a whole number") from None


class FilePath(click.ParamType[Path]):
    """A path. The command checks whether it exists."""

    name = "path"

    def __init__(self, extensions: tuple[str, ...] = ()) -> None:
        self.extensions = extensions

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not str(value).strip():
            self.fail("the path is empty", param, ctx)
        if "\0" in str(value):
            self.fail(f"the path {value!r} holds a zero byte", param, ctx)
        try:
            return Path(value).expanduser()
        except RuntimeError:
            self.fail(f"the path {value!r} names a user whose home is unknown", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return [CompletionItem(name) for name in files(incomplete, self.extensions)]


class Packing(click.ParamType[str]):
    """How weights are packed: bits, a mode of MLX, or a .json file with a plan of bits."""

    name = "packing"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names and not str(value).endswith(".json"):
            known = ", ".join(self.names)
            self.fail(
                f"{value!r} is none of {known}, and no plan of bits in a .json file", param, ctx
            )
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        found = [name for name in self.names if name.startswith(incomplete)]
        return [CompletionItem(name) for name in [*found, *files(incomplete, (".json",))]]


class NewFile(FilePath):
    """A file to be written, with one of the given extensions."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if path.suffix.lower() not in self.extensions:
            self.fail(f"{str(path)!r} must end in {' or '.join(self.extensions)}", param, ctx)
        return path


class Source(click.ParamType[str]):
    """A path, or a name that `known` lists (a bundled data set, the demo model)."""

    def __init__(self, name: str, known: dict[str, str], extensions: tuple[str, ...] = ()) -> None:
        self.name = name
        self.known = known
        self.extensions = extensions

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail(f"the {self.name} is empty", param, ctx)
        if "\0" in str(value):
            self.fail(f"the {self.name} {shown(str(value))} holds a zero byte", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        named = [CompletionItem(k, help=v) for k, v in self.known.items()]
        return [i for i in named if i.value.startswith(incomplete)] + [
            CompletionItem(name) for name in files(incomplete, self.extensions)
        ]


def files(incomplete: str, extensions: tuple[str, ...] = ()) -> list[str]:
    """Paths that start with `incomplete`, directories with a slash; hidden ones only if asked."""
    head, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(head + slash or ".").expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):  # no such directory, no such user, a zero byte
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            found.append(f"{head}{slash}{entry.name}/")
        elif not extensions or entry.suffix in extensions:
            found.append(f"{head}{slash}{entry.name}")
    return found[:MAX_COMPLETIONS]


class Words(click.types.StringParamType):
    """Words of a text. Options may stand before, between and behind them, unlike free text's."""

    name = "text"


class Node(click.types.IntParamType):
    """A node of the history tree."""

    name = "node"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        view: SessionView | None = ctx.obj
        nodes = view.history.nodes if view is not None and view.history is not None else ()
        return [
            CompletionItem(str(n.id), help=n.command)
            for n in nodes
            if str(n.id).startswith(incomplete)
        ]
