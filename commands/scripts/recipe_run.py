"""Runs a recipe: tries its variants, applies the best that meets the target, and goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from commands.scripts.recipe_file import Recipe
from commands.scripts.replay import ScriptRun
from commands.workbench.session_file import Script
from commands.workbench.workbench import Workbench
from mlxfun.context import Context
from mlxfun.errors import Cancelled, MlxfunError, StateError
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import JobEnded, Notice
from mlxfun.files import Kind, beginning_with, json_with, write_text
from mlxfun.report import Report
from mlxfun.session.measuring.loss_figure import loss_svg
from mlxfun.session.measuring.variants import RecipeReport, Variant, best, shortfall
from mlxfun.steering.command_line import line_of
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.bits.reports import BitsReport
from mlxfun.text import cut, escaped, shown

WRITTEN = {
    "report.json": Kind("report of a recipe", json_with("variants")),
    "loss.svg": Kind("picture", beginning_with(b"<svg", b"<?xml")),
}
"""What a recipe leaves in its output directory."""
PLAIN = "loss.svg is not drawn: it needs pip install 'mlxfun[plots]'"


class RecipeError(MlxfunError):
    """No variant of a recipe meets its target, or the chosen one could not be applied."""


class RecipeRun:
    """Runs a recipe: prepares, tries each variant, applies the best, goes on."""

    def __init__(self, bench: Workbench, recipe: Recipe, output: Path, ctx: Context) -> None:
        self.bench, self.recipe, self.output, self.ctx = bench, recipe, output, ctx
        self.node = 0
        self.steering: SteerReport | None = None
        self.steered = False
        self.plans: dict[str, str] = {}  # of `bits` lines, the files that they wrote

    def run(self) -> RecipeReport:
        """Run the whole recipe. Raises RecipeError if no variant meets the target."""
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
            variants.append(self._try(steps))
        if self.steered:
            text = "variants were measured while steering, which is no part of what is kept"
            self.ctx.emit(Notice("warning", text))
        kept = best(variants, self.recipe.target)
        files = self._write(variants, kept)
        if kept is None:
            where = f"; see {files[0]}"
            raise RecipeError(shortfall(variants, self.recipe.target) + where)
        edits, plan = self._edits(self.recipe.variants[kept])
        for number, step in enumerate(edits, 1):
            self._run_or_stop(step)
            if number < len(edits) or self.recipe.applies:
                self._run_or_stop("apply")
        self.ctx.emit(Notice("info", f"kept {variants[kept].line}"))
        if plan is not None:
            self.ctx.emit(Notice("info", f"its bits: save PATH --quantize {self.plans[plan]}"))
        self._script(self.recipe.after)
        name, target = str(self.recipe.path), str(self.recipe.target)
        return RecipeReport(name, target, size, tuple(variants), kept, files)

    def _script(self, script: Script) -> None:
        """Run ordinary lines as a replay does."""
        commands = [self.bench.wiring.command_of(entry.line) for entry in script.entries]
        ScriptRun(self.bench, script, commands, keep_going=False).run(self.ctx)

    # -- one variant --------------------------------------------------------------------------

    def _try(self, steps: tuple[str, ...]) -> Variant:
        """Stage, measure and discard one variant; a failure becomes part of the result."""
        line, began = " then ".join(steps), monotonic()
        try:
            size, kl, ratio = self._measure(steps)
        except _LineFailed as problem:
            return Variant(line, 0, None, None, monotonic() - began, str(problem))
        finally:
            self._restore()
        return Variant(line, size, kl, ratio, monotonic() - began)

    def _edits(self, steps: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
        """The edits of a variant, and the `bits` line at its end."""
        packs = self.bench.wiring.command_of(steps[-1]).name == "bits"
        return (steps[:-1], steps[-1]) if packs else (steps, None)

    def _packed(self, line: str) -> tuple[int, float, float]:
        """Bytes, KL and perplexity ratio of what `bits` has chosen for the state it stands at."""
        report = self._run_line(line).report
        assert isinstance(report, BitsReport)
        self.plans[line] = report.path
        return report.bytes, report.kl_after, report.ratio

    def _measure(self, steps: tuple[str, ...]) -> tuple[int, float, float]:
        """Bytes, KL and perplexity ratio of a variant."""
        edits, packing = self._edits(steps)
        for step in edits if packing else edits[:-1]:
            self._run_line(step)
            self._run_line("apply")
        if packing:
            return self._packed(packing)
        self._run_line(edits[-1])
        plan = self.bench.view().plan
        report = self._run_line(self.recipe.judge).report
        if plan is None or not isinstance(report, EvaluateReport):
            raise _LineFailed("it staged nothing that could be measured")
        if report.kl_mean is None:
            raise _LineFailed("the judge line leaves out the KL, which variants are compared by")
        if not math.isfinite(report.kl_mean) or not math.isfinite(report.ratio):
            raise _LineFailed(
                f"the model computes no numbers any more: KL {report.kl_mean:g}, perplexity "
                f"ratio {report.ratio:g}"
            )
        self.steered = self.steered or report.steered
        return plan.bytes_after, report.kl_mean, report.ratio

    def _restore(self) -> None:
        """Restore the state from before the first variant; also after a cancel."""
        session = self.bench.session
        if self.bench.view().plan is not None:
            self._journaled("discard", session.discard)
        history = self.bench.view().history
        if history is not None and history.current != self.node:
            self._journaled(f"goto {self.node}", lambda: session.goto(self.node))
        steering = self.steering
        if steering is not None and self.bench.view().steering != steering:
            # A variant baked the steering and was applied. The journal gets the steering as
            # restored: experts that were pruned before the recipe cannot be named again.
            restored = session.steer(steering)
            self._journaled(line_of(restored), lambda: restored)

    def _journaled(self, line: str, act: Callable[[], Report]) -> None:
        """Do what `line` does, even in a cancelled job, and write it to the journal."""
        journal = self.bench.journal
        journal.begin(line)
        act()
        journal.done(self.bench.mark)

    def _run_line(self, line: str) -> JobEnded:
        ended = self.bench.wiring.nested(line, self.ctx)
        if ended.cancelled:
            raise Cancelled(f"cancelled at {shown(line)}")
        if ended.error is not None:
            raise _LineFailed(ended.error)
        return ended

    def _run_or_stop(self, line: str) -> None:
        try:
            self._run_line(line)
        except _LineFailed as problem:
            raise RecipeError(f"{cut(line)}: {problem}") from None

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
            "report.json": escaped(json.dumps(document, indent=2, allow_nan=False)) + "\n",
        }
        if find_spec("matplotlib") is not None:
            texts["loss.svg"] = loss_svg(variants, target, kept).decode()
        else:
            self.ctx.emit(Notice("info", PLAIN))
        for name, text in texts.items():
            write_text(self.output / name, text, WRITTEN[name])
        return tuple(str(self.output / name) for name in texts)


class _LineFailed(Exception):
    """A line of a variant failed, with the reason."""
