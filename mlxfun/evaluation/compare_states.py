"""Measures two states of the history on the same tokens and returns to where the model was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlxfun.editing.editor import Editor, Live
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, NodeFigures
from mlxfun.model.anatomy.masks import mask_of

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.calibration.routing_stats import RoutingStats
    from mlxfun.model.anatomy import MoEMap

Measure = Callable[[], EvaluateReport]
Bytes = Callable[[], int]


class NodeComparer:
    """measure: the committed weights; saved: their bytes. Restores where the model stood, what redo
    leads to and the steering, whatever happens."""

    def __init__(
        self, anatomy: MoEMap, editor: Editor, stats: RoutingStats | None, measure: Measure,
        saved: Bytes,
    ) -> None:  # fmt: skip
        self._anatomy, self._editor, self._stats = anatomy, editor, stats
        self._measure, self._saved = measure, saved

    def compare(self, first: int, second: int) -> CompareReport:
        """Raises StateError while a plan is staged, or for a node that is not there."""
        editor = self._editor
        editor.require_unstaged("compare")
        with editor.unsteered(), editor.history.excursion(editor.swap):
            one = self._look(first)
            other = self._look(second)
        (a, living_a, report), (b, living_b, _) = one, other
        return CompareReport(
            a=a,
            b=b,
            tokens=report.tokens,
            datasets=report.datasets,
            only_a=self._only(living_a, living_b),
            only_b=self._only(living_b, living_a),
            steering_off=not editor.steering.empty,
        )

    def _look(self, number: int) -> tuple[NodeFigures, Live, EvaluateReport]:
        editor = self._editor
        editor.history.goto(number, editor.swap)
        node, living = editor.history.current, editor.committed
        report = self._measure()
        figures = NodeFigures(
            node=node.id,
            name=node.label or node.command,
            state=node.state,
            bytes=self._saved(),
            experts=sum(map(len, living)),
            work=self._work(mask_of(self._anatomy, living)),
            perplexity=report.perplexity["all"],
            ratio=report.ratio,
            kl_mean=report.kl_mean,
            samples=report.samples,
        )
        return figures, living, report

    def _work(self, alive: Array) -> float | None:
        """Share of the summed metric, mean over layers."""
        if self._stats is None:
            return None
        score = self._stats.score("reap_sum")
        total = score.sum(axis=1)
        shares = [
            float(row[here].sum() / whole)
            for row, here, whole in zip(score, alive, total, strict=True)
            if whole > 0
        ]
        return sum(shares) / len(shares) if shares else None

    def _only(self, one: Live, other: Live) -> dict[int, tuple[int, ...]]:
        return {
            layer: tuple(e for e in a if e not in set(b))
            for layer, a, b in zip(self._anatomy.indices, one, other, strict=True)
            if set(a) - set(b)
        }
