"""The command table of the README, generated from the registry.

python -m commands.reference --check   is the README up to date?
python -m commands.reference --write   bring it up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from commands.declare import GROUPS
from commands.registry import COMMANDS

BEGIN = "<!-- commands: written by python -m commands.reference --write -->"
END = "<!-- commands end -->"


def table() -> str:
    """One line per command, grouped as in help."""
    lines = ["| command | key | what it does |", "|---|---|---|"]
    for group in GROUPS:
        for command in (c for c in COMMANDS.values() if c.group == group):
            key = f"`{command.key}`" if command.key else ""
            cells = (f"`{command.usage}`", key, command.short)
            lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """`text` with the table between the markers. Raises ValueError when they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


@click.command()
@click.option("--write", is_flag=True, help="Write the table.")
@click.option("--check", is_flag=True, help="Fail if the table is not up to date.")
@click.argument("path", type=click.Path(path_type=Path), default=Path("README.md"))
def main(write: bool, check: bool, path: Path) -> None:
    """Check or write the command table in PATH."""
    if write == check:
        raise click.UsageError("give one of --check and --write")
    text = path.read_text("utf-8")
    try:
        wanted = updated(text)
    except ValueError as problem:
        raise click.ClickException(f"{path}: {problem}") from None
    if write:
        path.write_text(wanted, "utf-8")
    elif text != wanted:
        click.echo(f"{path} is out of date: run python -m commands.reference --write", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
