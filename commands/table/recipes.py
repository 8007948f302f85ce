"""`recipe` and `compress`: measure variants, and apply or stage the best that meets the target."""

from __future__ import annotations

from pathlib import Path

import click

from commands.conditions import always, with_stats
from commands.declare import Call, command
from commands.scripts.compressions import variants
from commands.scripts.recipe_file import Recipe, read_recipe
from commands.scripts.recipe_run import WRITTEN, RecipeRun
from commands.types import FilePath, Number, SavedSize
from commands.workbench.files import Files
from commands.workbench.session_file import Script
from commands.workbench.workbench import Workbench
from mlxfun.errors import StateError, UsageError
from mlxfun.files import require_writable
from mlxfun.report import Report
from mlxfun.session.measuring.variants import Target
from mlxfun.text import no_experts

NOT_TRIED = ("apply", "discard", "flip", "compact", "steer", "plan show", "plan save", "compress")
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


@command("compress", group="edit", danger=True, when=with_stats, recorded=False)
@click.option("--to-bytes", type=SavedSize(), metavar="SIZE", help="What the saved model may take.")
@click.option(
    "--max-kl",
    type=Number(0, min_open=True),
    metavar="X",
    help="Or the mean KL from the checkpoint that it may have, in nats a token.",
)
@click.option(
    "--bits/--no-bits",
    default=True,
    help="Also choose bits per module, of a model that is not quantised (default: on).",
)
@click.option(
    "--output",
    type=FilePath(),
    metavar="DIR",
    default="compress-report",
    help="Where report.json and loss.svg go (default: compress-report).",
)
def compress(call: Call) -> Report:
    """Try fewer experts, narrower ones and fewer bits within a size or a loss; stage the best.

    Every variant is staged, measured on what collect held out, and dropped again. --to-bytes keeps
    the least loss within that size, --max-kl the smallest within that loss. If bits per module are
    part of the best, their plan is a file for save --quantize. The report has a plot of loss against
    size. Decide by preview and ab, then apply.
    """
    bench = call.bench
    if bench.files.script is not None:
        raise UsageError("compress cannot run inside a replay or a recipe")
    size, loss = call["to_bytes"], call["max_kl"]
    if (size is None) == (loss is None):
        raise UsageError("say what is asked for by one of --to-bytes SIZE and --max-kl X")
    model = bench.view().model
    if model is None:
        raise StateError("no model is loaded")
    if not model.moe_layers:
        raise StateError(no_experts(model.model_type, "compress"))
    if missing := with_stats(bench.view()):  # else every variant would fail for want of text
        raise StateError(missing)
    target = Target("bytes", float(size)) if size is not None else Target("KL", float(loss))
    output = bench.writable(call["output"])
    for name, kind in WRITTEN.items():
        require_writable(output / name, kind)
    nothing = Script(Path("compress"))
    tried = variants(model, target, str(call["output"]), call["bits"])
    asked = Recipe(nothing.path, nothing, nothing, target, "preview", tried, applies=False)
    return RecipeRun(bench, asked, output, call.ctx).run()


COMMANDS = (recipe, compress)
