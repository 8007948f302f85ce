"""Heatmaps of results: as SVG documents, and as figures that Matplotlib draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import StateError
from mlxfun.text import FIGURES_NEED

CELL, LEFT, TOP, BOTTOM = 18, 64, 48, 90
MOST_LABELS = 64
"""Labels of an axis; of more every second, third ... one is shown."""
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a heatmap. name: what it counts, for instance "layer"; labels: of each place."""

    name: str
    labels: Sequence[str]


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    """A map of scores [rows, columns], nan for none. notes: of each cell, for the SVG document."""

    scores: Array
    rows: Axis
    columns: Axis
    title: str
    notes: Sequence[Sequence[str]] | None = None

    def svg(self) -> str:
        """The map as an SVG document, without any library."""
        return heatmap_svg(self.scores, self.rows, self.columns, self.title, self.notes)

    def figure(self, kind: str) -> bytes:
        """The map as a figure with axes and colour bar: a ".png" or a ".pdf".

        Raises StateError without Matplotlib.
        """
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise StateError(FIGURES_NEED) from error
        out, most = io.BytesIO(), largest(self.scores)
        height, width = self.scores.shape
        size = (min(20.0, max(3.5, 0.24 * width + 1.8)), min(20.0, max(2.2, 0.2 * height + 1.4)))
        ends = [tuple(part / 255 for part in rgb) for rgb in (BLUE, WHITE, RED)]
        with rc_context({"font.size": 8, "pdf.fonttype": 42}):
            page = Figure(figsize=size, layout="constrained")
            axes = page.add_subplot()
            image = axes.imshow(self.scores, cmap=_ramp(ends), vmin=-most, vmax=most,
                                origin="lower", aspect="auto", interpolation="none")  # fmt: skip
            axes.set_title(_plain(self.title), parse_math=False, wrap=True)
            axes.set_xlabel(self.columns.name)
            axes.set_ylabel(self.rows.name)
            for axis, labels in ((axes.xaxis, self.columns.labels), (axes.yaxis, self.rows.labels)):
                step = max(1, -(-len(labels) // MOST_LABELS))
                shown = [_plain(label) for label in labels[::step]]
                axis.set_ticks(range(0, len(labels), step), shown, parse_math=False)
            axes.tick_params(
                axis="x", rotation=90 if max(map(len, self.columns.labels), default=0) > 3 else 0
            )
            page.colorbar(image, ax=axes)
            page.savefig(out, format=kind[1:], dpi=300)
        return out.getvalue()


def _ramp(ends: Sequence[tuple[float, ...]]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("scores", ends)


def largest(scores: Array) -> float:
    """The largest absolute score, 1 where there is none: the end of the colours."""
    finite = np.abs(scores[np.isfinite(scores)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def heatmap_svg(
    scores: Array,
    rows: Axis,
    columns: Axis,
    title: str,
    notes: Sequence[Sequence[str]] | None = None,
) -> str:
    """scores [rows, columns] from blue (negative) over white to red (positive), nan left empty.

    The last row is on top, as a residual stream is drawn upwards. Each cell tells its value, and
    its note.
    """
    most = largest(scores)
    height, width = scores.shape[0] * CELL, scores.shape[1] * CELL
    total = max(LEFT + width + 16, 7 * len(title) + 24)
    said = f"scale -{most:.3g} (blue) to {most:.3g} (red); {rows.name} up, {columns.name} across"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{TOP + height + BOTTOM}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="12" fill="#111111">{_text(title)}</text>',
        f'<text x="8" y="36" fill="#555555">{_text(said)}</text>',
    ]
    for r, name in enumerate(rows.labels):
        y = TOP + (scores.shape[0] - 1 - r) * CELL
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end" fill="#333333">{_text(name)}</text>'
        )
        for c, column in enumerate(columns.labels):
            if np.isfinite(scores[r, c]):
                note = f"{rows.name} {name}, {columns.name} {column}: {scores[r, c]:+.4f}"
                note += f" {notes[r][c]!r}" if notes is not None else ""
                parts.append(_cell(c, y, float(scores[r, c]) / most, note))
    base = TOP + height + 10
    for c, column in enumerate(columns.labels):
        x = LEFT + c * CELL + 6
        parts.append(
            f'<text x="{x}" y="{base}" transform="rotate(45 {x} {base})" fill="#333333">'
            f"{_text(column)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _cell(column: int, y: int, share: float, note: str) -> str:
    return (
        f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{_colour(share)}"><title>{_text(note)}</title></rect>'
    )


def _text(text: str) -> str:
    """Text of a model or a person in XML: control characters are shown as spaces."""
    return escape(_plain(text))


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _colour(share: float) -> str:
    end = RED if share > 0 else BLUE
    mixed = (round(w + (e - w) * min(abs(share), 1.0)) for w, e in zip(WHITE, end, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
