"""The examples in README.md and in the guides, found in their text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDES = ROOT / "commands" / "guides"
DOCUMENTS = (README, *sorted(GUIDES.glob("*.md")))
ROOMS = tuple(ROOT / package / "README.md" for package in ("mlxfun", "commands", "tui"))

KINDS = {"mlxfun", "sh", "python", "toml"}
"""What a fenced block may be. `mlxfun fragment` needs what is not shown, `mlxfun network` the
network."""


class Block(NamedTuple):
    """A fenced block. kind: as it is opened; where: file and line of its first line."""

    kind: str
    text: str
    where: str

    @property
    def lines(self) -> list[str]:
        """Its lines, comments and empty ones left out, continued ones joined."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.startswith("#")]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document, and those indented by four columns as `sh`."""
    kind: str | None = None
    held: list[str] = []
    began, listed = 0, False
    for number, line in enumerate([*path.read_text("utf-8").splitlines(), ""], 1):
        if line.startswith("```"):
            if kind is None:
                kind, held, began = line[3:].strip(), [], number + 1
            else:
                yield Block(kind, "\n".join(held), f"{path.name}:{began}")
                kind = None
        elif kind is not None:
            held.append(line)
        elif line.startswith("    ") and not listed:
            yield Block("sh", line.strip(), f"{path.name}:{number}")
        else:
            listed = (listed and line.startswith(" ")) or bool(re.match(r"\d+\. |- ", line))


def shell_commands(block: Block) -> Iterator[list[str]]:
    """The programs that a `sh` block starts, as their words; what is set before one is left out."""
    for line in block.lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


def code_spans(path: Path) -> Iterator[str]:
    """What stands between backticks in running text."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)
