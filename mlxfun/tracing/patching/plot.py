"""Heatmaps as SVG documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from mlxfun.arrays import Array

CELL, LEFT, TOP, BOTTOM = 18, 64, 48, 90
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a heatmap. name: what it counts, for instance "layer"; labels: of each place."""

    name: str
    labels: Sequence[str]


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
    finite = np.abs(scores[np.isfinite(scores)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
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
    return escape("".join(c if c.isprintable() else " " for c in text))


def _colour(share: float) -> str:
    end = RED if share > 0 else BLUE
    mixed = (round(w + (e - w) * min(abs(share), 1.0)) for w, e in zip(WHITE, end, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
