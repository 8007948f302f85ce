"""`recipe`: measure the variants in a recipe file and apply the best that meets its target."""

from __future__ import annotations

from pathlib import Path

import click

from commands.conditions import always
from commands.declare import Call, command
from commands.scripts.recipe_file import read_recipe
from commands.scripts.recipe_run import WRITTEN, RecipeRun
from commands.types import FilePath
from commands.workbench.files import Files
from commands.workbench.workbench import Workbench
from mlxfun.errors import UsageError
from mlxfun.files import require_writable
from mlxfun.report import Report

NOT_TRIED = ("apply", "discard", "flip", "compact", "steer", "plan show", "plan save")
"""Commands of the group edit that stage nothing."""


@command("recipe", group="shell", danger=True, when=always, recorded=False)
@click.argument("path", type=FilePath((".recipe",)))
@click.option(
    "--output",
    type=FilePath(),
    metavar="DIR",
    help="Where report.json and loss.svg are written (default: FILE's name with -report).",
)
def recipe(call: Call) -> Report:
    """Try the variants that a recipe file lists, apply the best within its target, and continue.

    A recipe is a session file with a line such as at most 5.2 MB (the least loss within that size)
    or at most 0.4 KL (the smallest within that loss), and lines that begin with try. Each variant
    is staged, measured as preview does, and dropped again; the report has a plot of loss against
    size. When none meets the target nothing is applied.
    """
    bench = call.bench
    if bench.files.script is not None:
        raise UsageError(f"a recipe cannot run inside a replay or another recipe: {call['path']}")
    path = bench.readable(call["path"])
    found = read_recipe(path, lambda line, tried: _check(bench, line, tried))
    output = bench.writable(call["output"] or Path(f"{path.stem}-report"))
    for name, kind in WRITTEN.items():  # before variants are tried, which takes long
        require_writable(output / name, kind)
    before = bench.files
    bench.files = Files(before.root, path.resolve().parent)
    try:
        return RecipeRun(bench, found, output, call.ctx).run()
    finally:
        bench.files = before


def _check(bench: Workbench, line: str, tried: bool) -> None:
    """Raise UsageError for a line that a recipe cannot hold, or not at that place."""
    found = bench.wiring.command_of(line)
    name = found.name
    if name in ("replay", "resume", "recipe", "quit"):
        raise UsageError(f"{name} cannot be part of a recipe")
    if tried and (found.group != "edit" or name in NOT_TRIED):
        raise UsageError(f"{name} cannot be tried: try stages a plan, for instance with prune")


COMMANDS = (recipe,)
