"""The result of patching: a score for each component, as text, data and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxfun.arrays import Array
from mlxfun.tracing.options import ComponentName
from mlxfun.tracing.patching.plot import Axis, Plot

Method = Literal["activation patching", "path patching", "attribution patching"]
Across = Literal["position", "head", "expert"]


@dataclass(frozen=True, slots=True)
class Component:
    """One cell. layer: decoder layer; column: position, head or expert; score: see PatchResult."""

    layer: int
    column: int
    label: str
    score: float

    def described(self, across: Across) -> str:
        """In words: "layer 3, position 4 ' France'"."""
        said = f" {self.label!r}" if across == "position" else ""
        return f"layer {self.layer}, {across} {self.column}{said}"


@dataclass(frozen=True, slots=True)
class PatchResult:
    """Scores [rows, columns], nan where a layer has no such component.

    A score is the share of the way from the corrupted to the clean run that a component carries:
    0 leaves the metric at the corrupted run's, 1 brings it to the clean run's. layers: decoder
    layer of each row. across: what columns are; labels: their texts. clean, corrupted: the metric
    in both runs (means over the pairs).
    """

    method: Method
    component: ComponentName
    metric: str
    across: Across
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    scores: Array
    clean: float
    corrupted: float
    answer: str = ""
    other: str = ""
    pairs: int = 1
    receiver: str = ""

    def top_components(self, k: int = 5) -> list[Component]:
        """The k cells with the largest scores by size, largest first."""
        flat = np.nan_to_num(np.abs(self.scores), nan=-1.0).reshape(-1)
        order = np.argsort(-flat, kind="stable")[:k]
        cells = [divmod(int(i), self.scores.shape[1]) for i in order if flat[i] >= 0]
        return [
            Component(self.layers[r], c, self.labels[c], float(self.scores[r, c])) for r, c in cells
        ]

    def summary(self) -> str:
        """One sentence."""
        best = self.top_components(1)
        at = f"most at {best[0].described(self.across)}: {best[0].score:+.2f}" if best else "none"
        to = f" into {self.receiver}" if self.receiver else ""
        return (
            f"{self.method} of {self.component}{to}, {self.metric} {self.corrupted:.3f} corrupted, "
            f"{self.clean:.3f} clean; {at}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; nan as None."""
        rows = [[None if np.isnan(x) else float(x) for x in row] for row in self.scores]
        return {
            "method": self.method,
            "component": self.component,
            "metric": self.metric,
            "answer": self.answer,
            "other": self.other,
            "clean": self.clean,
            "corrupted": self.corrupted,
            "pairs": self.pairs,
            "receiver": self.receiver,
            "across": self.across,
            "layers": list(self.layers),
            "labels": list(self.labels),
            "scores": rows,
        }

    def to_json(self) -> str:
        """The same as a JSON object."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_markdown(self, k: int = 10) -> str:
        """The strongest components as a table."""
        lines = [f"{self.summary()}.", "", f"| layer | {self.across} | score |", "|---:|---|---:|"]
        for cell in self.top_components(k):
            said = (
                f"{cell.column} `{cell.label}`" if self.across == "position" else f"{cell.column}"
            )
            lines.append(
                f"| {cell.layer} | {said.replace('|', chr(92) + '|')} | {cell.score:+.3f} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self) -> str:
        """The same as `drawing`, an SVG document."""
        return self.drawing().svg()

    def drawing(self) -> Plot:
        """The scores as a heatmap."""
        shown = [f"{i} {t}" if self.across == "position" else t for i, t in enumerate(self.labels)]
        return Plot(
            self.scores,
            Axis("layer", [str(layer) for layer in self.layers]),
            Axis(self.across, shown),
            f"{self.method}: {self.component}, share of {self.metric} restored",
        )


def averaged(results: Sequence[PatchResult]) -> PatchResult:
    """The mean of the results of several pairs, whose grids must be alike."""
    first = results[0]
    if len(results) == 1:
        return first
    same = first.across != "position"
    labels = first.labels if same else tuple(str(i) for i in range(len(first.labels)))
    fields = {name: getattr(first, name) for name in ("method", "component", "metric", "across",
                                                      "layers", "receiver")}  # fmt: skip
    return PatchResult(
        **fields,
        labels=labels,
        scores=np.mean([one.scores for one in results], axis=0),
        clean=float(np.mean([one.clean for one in results])),
        corrupted=float(np.mean([one.corrupted for one in results])),
        pairs=len(results),
    )
