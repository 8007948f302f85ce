"""Measurements of the session's model: current weights, candidate, states of the history.

What a person asks to see is measured as it runs, steering included, and says so. What is kept or
decided about weights leaves steering out, since steering is no part of them: a state's scores, the
comparison of two states, and the guardrails of apply.
"""

from __future__ import annotations

from dataclasses import replace

from mlxfun.context import Context
from mlxfun.editing.editor import Staged
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation import measure
from mlxfun.evaluation.compare_states import NodeComparer
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import CompareReport, EvaluateReport
from mlxfun.events import Notice
from mlxfun.generation.conversation import Conversation
from mlxfun.session.workspace import Workshop


class Measurements:
    """A session makes one. conversation: answers sample prompts."""

    def __init__(self, shop: Workshop, conversation: Conversation) -> None:
        self._shop, self._conversation = shop, conversation
        self._editor = shop.editor

    def evaluate(self, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        """Measure the committed weights; the figures become the state's scores if nothing steers."""
        report = self._measure("current", options, ctx)
        self._editor.history.current.scores.update(measure.scores(report))
        return report

    def preview(self, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        """Measure the staged plan, and keep that with it."""
        staged = self._editor.require_staged("preview")
        staged.preview, staged.asked = self._measure("staged", options, ctx), options
        return staged.preview

    def compare(
        self, first: int, second: int, options: EvaluateOptions, ctx: Context
    ) -> CompareReport:
        """Measure two states of the history without steering."""
        comparer = NodeComparer(
            self._shop.anatomy,
            self._editor,
            self._shop.observations.stats,
            lambda: self._measure("current", options, ctx),
            lambda: self._shop.export().total_bytes(),
        )
        return comparer.compare(first, second)

    def guard(self, staged: Staged, options: ApplyOptions, ctx: Context) -> None:
        """Raise StateError with the figures if a guardrail of apply is broken.

        A preview that was made while steering does not decide, it is made again without.
        """
        if (options.max_kl, options.max_perplexity_ratio) == (None, None):
            return
        if not self._editor.steering_of("staged").empty:
            text = "the guardrails measure without steering, which is no part of what is applied"
            ctx.emit(Notice("info", text))
        if staged.preview is None or staged.preview.steered:
            with self._editor.unsteered():
                self.preview(replace(staged.asked or EvaluateOptions(), samples=0), ctx)
        assert staged.preview is not None
        measure.require_within(staged.preview, options)

    def _measure(self, subject: str, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        sets = self._sets(options)
        return measure.measure(
            self._editor,
            self._shop.evaluator,
            subject,
            sets,
            lambda: self._conversation.samples(options, sets, ctx),
            ctx,
        )

    def _sets(self, options: EvaluateOptions) -> list[EvalSet]:
        shop = self._shop
        return measure.eval_sets(options, shop.tokenizer, shop.anatomy.vocabulary, shop.held_out)
