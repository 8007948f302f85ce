"""The format of session files, and how they are read.

    #!mlxfun-session 2
    #: mlxfun 0.1.0
    #: model demo
    #: checkpoint 0c4d...
    #: seed 1
    collect --dataset demo:mixed --max-samples 32
    #= state 0c4d...
    prune --n-prune 4
    #= state 0c4d... staged 9e1a...
    expect perplexity.all <= 14.2

One command a line. `#:` lines are the header, `#=` holds the state after the command above it,
`#~ after N tokens of the answer above` says when the command below ran in the middle of it, any
other `#` line is a comment. A command or header value that holds line breaks, other control
characters or outer blanks is written as a JSON string.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mlxfun.data.options import require_seed
from mlxfun.errors import UsageError
from mlxfun.files import read_text
from mlxfun.text import shown

MAGIC = "#!mlxfun-session"
FORMAT = 2
"""What is written. In format 1 steering was no step of the history, and no mark named it."""

FORMATS = (1, 2)
"""What is read."""

KEYS = ("mlxfun", "mlx", "mlx-lm", "model", "revision", "checkpoint", "seed", "directory",
        "chat-template", "residency")  # fmt: skip

_DURING = re.compile(r"#~\s*after\s+(\d+)\s+tokens of the answer above\s*\Z")

_MARK = re.compile(r"#=\s*state\s+(\S+)(?:\s+staged\s+(\S+))?(?:\s+steered\s+(\S+))?\s*\Z")


class EmptyScript(UsageError):
    """A session file without a command."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The state after a command. staged: the state that apply would give, None with no plan.
    steered: identity of the steering in force, "" for none."""

    state: str
    staged: str | None = None
    steered: str = ""

    def __str__(self) -> str:
        text = f"state {self.state}" + (f" staged {self.staged}" if self.staged else "")
        return text + (f" steered {self.steered}" if self.steered else "")


@dataclass(slots=True)
class Entry:
    """A command of a script. number: its line in the file, from 1.

    during: how many tokens the answer before it had when it ran, None if it ran on its own.
    """

    number: int
    line: str
    mark: Mark | None = None
    during: int | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """A session file in memory. header: the `#:` lines, without their `#:`. format: see FORMAT."""

    path: Path
    header: dict[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    format: int = FORMAT

    def where(self, entry: Entry) -> str:
        """`file:line` of an entry."""
        return f"{self.path}:{entry.number}"

    @property
    def seed(self) -> int | None:
        """The seed of the header."""
        return int(self.header["seed"]) if "seed" in self.header else None


def encode(line: str) -> str:
    """A command line as one line of a session file."""
    plain = line.isprintable() and not line.startswith(("#", '"')) and line == line.strip()
    return line if plain else json.dumps(line)


def decode(text: str) -> str:
    """The reverse of `encode`. Raises ValueError for a broken JSON string."""
    if not text.startswith('"'):
        return text
    line = json.loads(text)
    if not isinstance(line, str):
        raise ValueError("not a JSON string")
    return line


def read_script(path: Path, kept: bool = False, kind: str = "replay file") -> Script:
    """Parse a session file. Raises UsageError with file and line.

    kept: one that was cut short, whose last line may be, too: text without a line end is left out.
    kind: what the file is meant to be, for the errors.
    """
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise UsageError(f"cannot read the {kind} {path}: {reason}") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text, so not a {kind}") from None
    if kept:
        text = text[: text.rfind("\n") + 1]
    header: dict[str, str] = {}
    reading = _Reading()
    # Not splitlines(): it also breaks at characters that text inside a command may hold.
    for number, raw in enumerate(text.split("\n"), 1):
        try:
            _read_line(raw.strip(), number, header, reading)
        except ValueError as problem:
            raise UsageError(f"{path}:{number}: {problem}") from None
    entries = reading.entries
    if not entries:
        raise EmptyScript(f"{path} holds no command: a {kind} has one command a line")
    return Script(path, header, tuple(entries), _format_of(text))


@dataclass(slots=True)
class _Reading:
    """The entries so far. during: what was said of the next one, see Entry."""

    entries: list[Entry] = field(default_factory=list)
    during: int | None = None


def _read_line(text: str, number: int, header: dict[str, str], reading: _Reading) -> None:
    entries = reading.entries
    if text.startswith(MAGIC):
        version = text.removeprefix(MAGIC).strip()
        if version not in map(str, FORMATS):
            raise ValueError(
                f"session format {shown(version)} is unknown, this program reads "
                f"{' and '.join(map(str, FORMATS))}"
            )
    elif text.startswith("#:"):
        key, _, value = text[2:].strip().partition(" ")
        value = decode(value.strip())
        _check_header(key, value)
        header[key] = value
    elif text.startswith("#="):
        match = _MARK.match(text)
        if match is None:
            raise ValueError(
                f"{shown(text)} is not of the form '#= state ID' or '#= state ID staged ID'"
            )
        if not entries or entries[-1].mark is not None:
            raise ValueError(f"{shown(text)} follows no command")
        entries[-1].mark = Mark(match[1], match[2], match[3] or "")
    elif text.startswith("#~"):
        found = _DURING.match(text)
        if found is None or not entries:
            raise ValueError(
                f"{shown(text)} is not of the form '#~ after 12 tokens of the answer above', "
                "behind a command"
            )
        reading.during = int(found[1])
    elif text and not text.startswith("#"):
        entries.append(Entry(number, decode(text), during=reading.during))
        reading.during = None


def _format_of(text: str) -> int:
    """The format a file says it has; one that does not say is written by hand, for this version."""
    first = text.lstrip().partition("\n")[0]
    return int(first.removeprefix(MAGIC)) if first.startswith(MAGIC) else FORMAT


def _check_header(key: str, value: str) -> None:
    if key not in KEYS or not value.strip():
        raise ValueError(f"header line {shown(key)} is not one of {', '.join(KEYS)} with a value")
    if key == "seed":
        try:
            require_seed(int(value))
        except (ValueError, UsageError):
            raise ValueError(
                f"the seed {shown(value.strip(), 40)} is not a whole number from 0 on"
            ) from None
