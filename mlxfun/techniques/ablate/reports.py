"""Reports on a staged ablation, its search and its effect on refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mlxfun.editing.reports import PlanReport
from mlxfun.evaluation.reports import RefusalCount, RefusalReport
from mlxfun.techniques.ablate.options import Position, Projection, Target


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One point of a search's Pareto front. number: for --choose.

    expected, kl: as judged in the trial. count: refusals counted on whole answers, None where the
    point was not among the finalists. strengths: the maximum of each component. perplexity: of
    plain text in the trial, as a multiple of what it was.
    """

    number: int
    source_layer: int
    position: Position
    strengths: dict[str, float]
    expected: float
    kl: float
    count: RefusalCount | None = None
    perplexity: float = 1.0


@dataclass(frozen=True, slots=True)
class AblationReport(PlanReport):
    """A staged ablation.

    source_layer, position: where the direction was taken, or the layer whose parts lose most. norms: {decoder layer: norm of the
    difference of means}. strengths: {component: {decoder layer: strength}}. edited: what loses the
    direction, tensors. samples: prompts used to find, to select and to check, of each set.
    refusals: on prompts that neither the direction nor the search has seen. trials, judged,
    trials_per_minute, front, chosen: of a search. trial_kl, staged_kl: first-token KL of the
    chosen point as tried on activations, and of the staged weights, on the same prompts.
    """

    kind: ClassVar[str] = "abliterate"
    target: Target = "all"
    projection: Projection = "oblique"
    source_layer: int = 0
    position: Position = "last"
    norms: dict[int, float] = field(default_factory=dict)
    strengths: dict[str, dict[int, float]] = field(default_factory=dict)
    edited: int = 0
    samples: tuple[int, int, int] = (0, 0, 0)
    refusals: RefusalReport | None = None
    trials: int = 0
    judged: str = ""
    trials_per_minute: float = 0.0
    front: tuple[FrontPoint, ...] = ()
    chosen: int | None = None
    trial_kl: float | None = None
    staged_kl: float | None = None

    def summary(self) -> str:
        what = (
            "the difference between harmful and harmless prompts"
            if self.projection == "oblique"
            else f"the direction behind layer {self.source_layer} ({self.position})"
        )
        text = f"{self.deed}: {what} is removed from {self.edited} tensors"
        if self.refusals is not None:
            now = self.refusals
            text += (
                f"; unseen prompts refused: {now.before} before, {now.after} after, "
                f"first-token KL {now.first_token_kl:.4f}"
            )
        return text
