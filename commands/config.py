"""Reads and checks the user's configuration, a TOML file; errors name file and line.

    theme = "mlxfun-light"
    refresh_rate = 10            # frames a second, at most
    undo_budget = "2GiB"
    keep_sessions = true         # so that --resume can bring them back

    [defaults]                   # what `set` changes, for the screen and --plain
    metric = "reap_sum"
    max-tokens = 512

    [keys]                       # the name of a key, which F1 shows = the keys, "" for none
    apply = "ctrl+a"

Headless runs and replays do not read it, so that a script does the same for every user.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlxfun.errors import UsageError
from mlxfun.files import read_text
from mlxfun.text import cut, shown


def default_path() -> Path:
    """The path of the user's configuration on this system."""
    from platformdirs import user_config_path

    return user_config_path("mlxfun") / "config.toml"


@dataclass(frozen=True, slots=True)
class Config:
    """The entries of a configuration file; None and empty for those it does not have.

    refresh_rate: frames a second. undo_budget: bytes. defaults: names and values of `set`. keys:
    {name of a key: the keys with commas, as Textual writes them, "" for none}. lines: {name: its
    line}, `keys.apply` for an entry of a table.
    """

    path: Path | None = None
    theme: str | None = None
    refresh_rate: float | None = None
    undo_budget: int | None = None
    keep_sessions: bool = True
    defaults: Mapping[str, object] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    def error(self, name: str, problem: str) -> UsageError:
        """The error for the entry `name`, with file and line."""
        return UsageError(f"{self.path}:{self.lines.get(name, 1)}: {name}: {problem}")


def read_config(path: Path | None = None) -> Config:
    """Read `path`, by default the user's file if there is one.

    Raises UsageError: unreadable, not TOML, an unknown name, or a value that does not fit.
    """
    chosen = path or default_path()
    try:
        text = read_text(chosen, "utf-8-sig")
    except FileNotFoundError:
        if path is None:
            return Config()
        raise UsageError(f"the configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot read the configuration {chosen}: {problem}") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        line = re.search(r"line (\d+)", str(problem))
        where = line[1] if line else str(text.count("\n") + 1)
        raise UsageError(f"{chosen}:{where}: {problem}") from None
    except ValueError:  # from int(), which takes no number of that length
        raise UsageError(f"{chosen} holds a number of thousands of digits") from None
    except RecursionError:
        raise UsageError(f"{chosen} is nested too deeply") from None
    return _checked(Config(chosen, lines=_lines(text)), found)


def _lines(text: str) -> dict[str, int]:
    """{name: its line, from 1}."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.-]+)\]", line):
            table = f"{header[1]}."
            found.setdefault(header[1], number)
        elif entry := re.match(r'\s*"?([\w+.-]+)"?\s*=', line):
            found.setdefault(f"{table}{entry[1]}", number)
    return found


def _checked(config: Config, found: dict[str, object]) -> Config:
    known = [f.name for f in fields(Config) if f.name not in ("path", "lines")]
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name not in known:
            raise config.error(cut(name), f"unknown; known are {', '.join(known)}")
        values[name] = CHECKS[name](config, name, value)
    return Config(config.path, lines=config.lines, **values)


def _text(config: Config, name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise config.error(name, f"{shown(value)} is not a text")
    return value


def _rate(config: Config, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 60:
        raise config.error(
            name, f"{shown(value)} is not a number of frames a second from 0.5 to 60"
        )
    return float(value)


def _size(config: Config, name: str, value: object) -> int:
    from commands.types import Size

    try:
        return Size.parse(str(value))
    except ValueError as problem:
        raise config.error(name, str(problem)) from None


def _switch(config: Config, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise config.error(name, f"{shown(value)} is not true or false")
    return value


def _table(config: Config, name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise config.error(name, f"{shown(value)} is not a table: begin it with [{name}]")
    return value


def _defaults(config: Config, name: str, value: object) -> dict[str, object]:
    import click  # the screen reads this module too, and paints before it needs Click

    from commands.table.shell import SETTING_TYPES

    checked = {}
    for key, given in _table(config, name, value).items():
        where = f"{name}.{key}"
        kind = SETTING_TYPES.get(key)
        if kind is None:
            raise config.error(cut(where), f"unknown; known are {', '.join(SETTING_TYPES)}")
        try:
            checked[key] = kind.convert(str(given), None, None)
        except click.BadParameter as problem:
            raise config.error(where, problem.message) from None
    return checked


def _keys(config: Config, name: str, value: object) -> dict[str, str]:
    # The screen checks the names and the keys (tui.config_check).
    return {
        key: given if given == "" else _text(config, f"{name}.{key}", given)
        for key, given in _table(config, name, value).items()
    }


CHECKS: dict[str, Callable[[Config, str, object], object]] = {
    "theme": _text,
    "refresh_rate": _rate,
    "undo_budget": _size,
    "keep_sessions": _switch,
    "defaults": _defaults,
    "keys": _keys,
}
