"""The generated parts of the documentation: command table, list of guides, trees of files.

The table's examples are the first line for each command in the session file that the tests run.

python -m commands.reference --check   is everything generated up to date?
python -m commands.reference --write   bring it up to date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from commands.declare import GROUPS
from commands.guides.index import GUIDES
from commands.registry import COMMANDS, command_of

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = "written by python -m commands.reference --write"
WALK = Path("tests") / "walk.mlxfun"
ELSEWHERE = {
    "load": "load demo",
    "prepare-dataset": "prepare-dataset OWNER/NAME --output data.jsonl",
    "recover": "recover .",
    "record": "record s.mlxfun",
    "replay": f"replay {WALK.as_posix()}",
    "recipe": "recipe tests/small.recipe",
    "compress": "compress --to-bytes 5MB",
    "resume": "resume",
    "serve": "serve",
    "quit": "quit",
}
"""Examples of commands that a session file does not hold, or that need the network."""

LIBRARY = "<!-- library: run by a test -->"

COLUMN = 34
"""Where the sentences of a tree begin."""


def examples(root: Path) -> dict[str, str]:
    """An example for each command, by its name."""
    found = dict(ELSEWHERE)
    for line in (root / WALK).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            found.setdefault(command_of(line), line)
    return found


def command_table(shown: Mapping[str, str]) -> str:
    """One line per command, grouped as in help. shown: an example for each, by name.

    Raises KeyError for a command without an example.
    """
    lines = ["| command | key | what it does | for example |", "|---|---|---|---|"]
    for group in GROUPS:
        for command in (c for c in COMMANDS.values() if c.group == group):
            key = f"`{command.key}`" if command.key else ""
            cells = (f"`{command.usage}`", key, command.short, f"`{shown[command.name]}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def guide_list() -> str:
    """One line per guide, with a link to it."""
    return "\n".join(
        f"- [{guide.name}](commands/guides/{guide.name}.md): {guide.summary}"
        for guide in GUIDES.values()
    )


def library_example(root: Path) -> str:
    """The example for library users, as it stands in README.md, where a test runs it."""
    after = (root / "README.md").read_text("utf-8").partition(LIBRARY)[2]
    return after.partition("<!-- library end -->")[0].strip()


def file_tree(package: Path) -> str:
    """One line per module of a package: the first sentence of its docstring."""
    lines = [*_tree(package, "")]
    return "\n".join(["```", *lines, "```"])


def _tree(folder: Path, margin: str) -> Iterator[str]:
    yield _line(f"{margin}{folder.name}/", folder / "__init__.py")
    inside = margin + "  "
    modules = [p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    for path in modules:
        yield _line(inside + path.stem, path)
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            yield from _tree(path, inside)


def _line(name: str, path: Path) -> str:
    return f"{name:<{COLUMN}}{_sentence(path)}".rstrip()


def _sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    first, stop, _ = paragraph.partition(". ")
    return first + "." if stop else paragraph


def _tree_of(package: str) -> Callable[[Path], str]:
    return lambda root: file_tree(root / package)


PARTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"guides": lambda _root: guide_list()},
    "commands/guides/library.md": {"library": library_example},
    "commands/guides/commands.md": {"commands": lambda root: command_table(examples(root))},
    "mlxfun/README.md": {"tree": _tree_of("mlxfun")},
    "commands/README.md": {"tree": _tree_of("commands")},
    "tui/README.md": {"tree": _tree_of("tui")},
}
"""{file: {name of a generated part: what makes it, from the root of the project}}."""


def updated(file: str, text: str, root: Path = ROOT) -> str:
    """`text`, the content of `file`, with everything generated brought up to date.

    Raises ValueError without markers, KeyError for a command without an example.
    """
    for name, make in PARTS[file].items():
        begin, end = f"<!-- {name}: {WRITTEN} -->", f"<!-- {name} end -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise ValueError(f"{file}: the markers {begin} and {end} are missing")
        text = f"{before}{begin}\n{make(root)}\n{end}{after}"
    return text


@click.command()
@click.option("--write", is_flag=True, help="Write what is generated.")
@click.option("--check", is_flag=True, help="Fail if it is not up to date.")
def main(write: bool, check: bool) -> None:
    """Check or write the generated parts of the documentation."""
    if write == check:
        raise click.UsageError("give one of --check and --write")
    stale = []
    for file in PARTS:
        text = (ROOT / file).read_text("utf-8")
        try:
            wanted = updated(file, text, ROOT)
        except ValueError as problem:
            raise click.ClickException(str(problem)) from None
        if text != wanted:
            stale.append(file)
            if write:
                (ROOT / file).write_text(wanted, "utf-8")
    if check and stale:
        names = ", ".join(stale)
        click.echo(f"out of date: {names}; run python -m commands.reference --write", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
