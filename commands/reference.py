"""The generated parts of the README: the command table, and the tree of files.

The table's examples are the first line for each command in the session file that the tests run.

python -m commands.reference --check   is the README up to date?
python -m commands.reference --write   bring it up to date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from commands.declare import GROUPS
from commands.registry import COMMANDS, command_of

PACKAGES = ("mlxfun", "commands", "tui")
WRITTEN = "written by python -m commands.reference --write"
WALK = Path("tests") / "walk.mlxfun"
ELSEWHERE = {
    "load": "load demo",
    "prepare-dataset": "prepare-dataset OWNER/NAME --output data.jsonl",
    "recover": "recover .",
    "record": "record s.mlxfun",
    "replay": f"replay {WALK.as_posix()}",
    "resume": "resume",
    "quit": "quit",
}
"""Examples of commands that a session file does not hold, or that need the network."""


def examples(root: Path) -> dict[str, str]:
    """An example for each command, by its name."""
    found = dict(ELSEWHERE)
    for line in (root / WALK).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            found.setdefault(command_of(line), line)
    return found


def command_table(shown: Mapping[str, str]) -> str:
    """One line per command, grouped as in help. shown: an example for each, by name."""
    lines = ["| command | key | what it does | for example |", "|---|---|---|---|"]
    for group in GROUPS:
        for command in (c for c in COMMANDS.values() if c.group == group):
            key = f"`{command.key}`" if command.key else ""
            cells = (f"`{command.usage}`", key, command.short, f"`{shown[command.name]}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def file_tree(root: Path) -> str:
    """One line per module: the first sentence of its docstring. Folders below a package are one."""
    lines = ["```"]
    for package in PACKAGES:
        lines.append(f"{package + '/':<22}{_sentence(root / package / '__init__.py')}")
        for path in sorted((root / package).iterdir()):
            if path.suffix == ".py" and path.stem != "__init__":
                lines.append(f"  {path.stem:<20}{_sentence(path)}")
            elif (path / "__init__.py").is_file():
                lines.append(f"  {path.name + '/':<20}{_sentence(path / '__init__.py')}")
    return "\n".join([*(line.rstrip() for line in lines), "```"])


def _sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    first, stop, _ = paragraph.partition(". ")
    return first + "." if stop else paragraph


def updated(text: str, root: Path) -> str:
    """`text` with everything generated brought up to date.

    Raises ValueError without markers, KeyError for a command without an example.
    """
    parts: dict[str, Callable[[], str]] = {
        "commands": lambda: command_table(examples(root)),
        "tree": lambda: file_tree(root),
    }
    for name, make in parts.items():
        begin, end = f"<!-- {name}: {WRITTEN} -->", f"<!-- {name} end -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise ValueError(f"the markers {begin} and {end} are missing")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


@click.command()
@click.option("--write", is_flag=True, help="Write what is generated.")
@click.option("--check", is_flag=True, help="Fail if it is not up to date.")
@click.argument("path", type=click.Path(path_type=Path), default=Path("README.md"))
def main(write: bool, check: bool, path: Path) -> None:
    """Check or write the generated parts of PATH, which lies in the root of the project."""
    if write == check:
        raise click.UsageError("give one of --check and --write")
    text = path.read_text("utf-8")
    try:
        wanted = updated(text, path.resolve().parent)
    except ValueError as problem:
        raise click.ClickException(f"{path}: {problem}") from None
    if write:
        path.write_text(wanted, "utf-8")
    elif text != wanted:
        click.echo(f"{path} is out of date: run python -m commands.reference --write", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
