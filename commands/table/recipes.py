"""`recipe`: measure the variants in a recipe file and apply the best that meets its target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import click

from commands.conditions import always
from commands.declare import Call, command
from commands.scripts.recipe_file import Recipe, read_recipe
from commands.scripts.replay import Run
from commands.types import FilePath
from commands.workbench.files import Files
from commands.workbench.session_file import Script
from commands.workbench.workbench import Workbench
from mlxfun.context import Context
from mlxfun.errors import Cancelled, MlxfunError, StateError, UsageError
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import JobEnded, Notice
from mlxfun.files import Kind, beginning_with, json_with, require_writable, write_text
from mlxfun.report import Report
from mlxfun.session.variants import RecipeReport, Variant, best, loss_svg, shortfall
from mlxfun.steering.command_line import line_of
from mlxfun.steering.reports import SteerReport

NOT_TRIED = ("apply", "discard", "flip", "compact", "steer", "plan show", "plan save")
"""Commands of the group edit that stage nothing."""
WRITTEN = {
    "report.json": Kind("report of a recipe", json_with("variants")),
    "loss.svg": Kind("picture", beginning_with(b"<svg")),
}
"""What a recipe leaves in its output directory."""


class RecipeError(MlxfunError):
    """A recipe whose target no variant meets; nothing was changed."""


@command("recipe", group="shell", danger=True, when=always, recorded=False)
@click.argument("path", type=FilePath((".recipe",)))
@click.option(
    "--output",
    type=FilePath(),
    metavar="DIR",
    help="Where report.json and loss.svg go (default: FILE's name with -report).",
)
def recipe(call: Call) -> Report:
    """Try the variants that a recipe file lists, apply the best within its target, go on with it.

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
        return _Kitchen(bench, found, output, call.ctx).run()
    finally:
        bench.files = before


def _check(bench: Workbench, line: str, tried: bool) -> None:
    """Raise UsageError for a line that cannot run where it stands."""
    found = bench.wiring.command_of(line)
    name = found.name
    if name in ("replay", "recipe", "quit"):
        raise UsageError(f"{name} cannot be part of a recipe")
    if tried and (found.group != "edit" or name in NOT_TRIED):
        raise UsageError(f"{name} cannot be tried: try stages a plan, for instance with prune")


class _Kitchen:
    """One run of a recipe."""

    def __init__(self, bench: Workbench, recipe: Recipe, output: Path, ctx: Context) -> None:
        self.bench, self.recipe, self.output, self.ctx = bench, recipe, output, ctx
        self.node = 0
        self.steering: SteerReport | None = None
        self.steered = False

    def run(self) -> RecipeReport:
        """Prepare, try, keep, go on."""
        self._script(self.recipe.before)
        view = self.bench.view()
        if view.model is None or view.history is None:
            raise StateError("no model is loaded: name one in the recipe, #: model demo")
        if view.plan is not None:
            raise StateError("a plan is staged; apply or discard it before running a recipe")
        self.node, size = view.history.current, view.model.checkpoint_bytes
        self.steering = view.steering
        variants = []
        for number, steps in enumerate(self.recipe.variants):
            self.ctx.progress("trying variants", number, len(self.recipe.variants), "variants")
            variants.append(self._tried(steps))
        if self.steered:
            text = "variants were measured while steering, which is no part of what is kept"
            self.ctx.emit(Notice("warning", text))
        kept = best(variants, self.recipe.target)
        files = self._write(variants, kept)
        if kept is None:
            where = f"; see {files[0]}"
            raise RecipeError(shortfall(variants, self.recipe.target) + where)
        for step in self.recipe.variants[kept]:
            self._must(step)
            self._must("apply")
        self.ctx.emit(Notice("info", f"kept {variants[kept].line}"))
        self._script(self.recipe.after)
        name, target = str(self.recipe.path), str(self.recipe.target)
        return RecipeReport(name, target, size, tuple(variants), kept, files)

    def _script(self, script: Script) -> None:
        """Ordinary lines, as a replay runs them."""
        commands = [self.bench.wiring.command_of(entry.line) for entry in script.entries]
        Run(self.bench, script, commands, keep_going=False).run(self.ctx)

    # -- one variant --------------------------------------------------------------------------

    def _tried(self, steps: tuple[str, ...]) -> Variant:
        """Stage, measure, and drop again; what a variant cannot do is written down."""
        line, began = " then ".join(steps), monotonic()
        try:
            report, size = self._measured(steps)
        except _Failed as problem:
            return Variant(line, 0, None, None, monotonic() - began, str(problem))
        finally:
            self._back()
        return Variant(line, size, report.kl_mean, report.ratio, monotonic() - began)

    def _measured(self, steps: tuple[str, ...]) -> tuple[EvaluateReport, int]:
        for step in steps[:-1]:
            self._do(step)
            self._do("apply")
        self._do(steps[-1])
        plan = self.bench.view().plan
        report = self._do(self.recipe.judge).report
        if plan is None or not isinstance(report, EvaluateReport):
            raise _Failed("it staged nothing that could be measured")
        if report.kl_mean is None:
            raise _Failed("the judge line leaves out the KL, which variants are compared by")
        if not math.isfinite(report.kl_mean) or not math.isfinite(report.ratio):
            raise _Failed(
                f"the model computes no numbers any more: KL {report.kl_mean:g}, perplexity "
                f"ratio {report.ratio:g}"
            )
        self.steered = self.steered or report.steered
        return report, plan.bytes_after

    def _back(self) -> None:
        """To where the recipe began, whatever was staged or applied since; also after a cancel."""
        session = self.bench.session
        if self.bench.view().plan is not None:
            self._noted("discard", session.discard)
        history = self.bench.view().history
        if history is not None and history.current != self.node:
            self._noted(f"goto {self.node}", lambda: session.goto(self.node))
        steering = self.steering
        if steering is not None and self.bench.view().steering != steering:
            # A variant baked it and was applied. Written down is what came of it: experts that
            # were pruned before the recipe cannot be named again.
            restored = session.steer(steering)
            self._noted(line_of(restored), lambda: restored)

    def _noted(self, line: str, act: Callable[[], Report]) -> None:
        """Do what `line` does, also where a cancelled job would do no more, and write it down."""
        journal = self.bench.journal
        journal.begin(line)
        act()
        journal.done(self.bench.mark)

    def _do(self, line: str) -> JobEnded:
        ended = self.bench.wiring.nested(line, self.ctx)
        if ended.cancelled:
            raise Cancelled(f"cancelled at {line!r}")
        if ended.error is not None:
            raise _Failed(ended.error)
        return ended

    def _must(self, line: str) -> None:
        try:
            self._do(line)
        except _Failed as problem:
            raise RecipeError(f"{line}: {problem}") from None

    # -- the report ---------------------------------------------------------------------------

    def _write(self, variants: list[Variant], kept: int | None) -> tuple[str, ...]:
        target = self.recipe.target
        document = {
            "recipe": str(self.recipe.path),
            "target": str(target),
            "judge": self.recipe.judge,
            "kept": kept,
            "variants": [asdict(v) | {"meets": target.met_by(v)} for v in variants],
        }
        texts = {
            "report.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
            "loss.svg": loss_svg(variants, target, kept),
        }
        for name, text in texts.items():
            write_text(self.output / name, text, WRITTEN[name])
        return tuple(str(self.output / name) for name in texts)


class _Failed(Exception):
    """A line of a variant failed; the text says why."""


COMMANDS = (recipe,)
