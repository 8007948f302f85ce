"""Heatmaps as SVG documents."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mlxfun.arrays import Array

CELL, LEFT, TOP, BOTTOM = 18, 64, 48, 90
BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def heatmap_svg(
    scores: Array, rows: Sequence[str], columns: Sequence[str], *, title: str, across: str
) -> str:
    """scores [rows, columns] from blue (negative) over white to red (positive), nan left empty.

    rows: layers, the last one on top, as a stream is drawn upwards. Each cell tells its value.
    """
    finite = np.abs(scores[np.isfinite(scores)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    height, width = scores.shape[0] * CELL, scores.shape[1] * CELL
    total = max(LEFT + width + 16, 7 * len(title) + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{TOP + height + BOTTOM}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="12" fill="#111111">{_text(title)}</text>',
        f'<text x="8" y="36" fill="#555555">scale -{most:.3g} (blue) to {most:.3g} (red); '
        f"layers up, {_text(across)} across</text>",
    ]
    for r, name in enumerate(rows):
        y = TOP + (scores.shape[0] - 1 - r) * CELL
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end" fill="#333333">{_text(name)}</text>'
        )
        for c, column in enumerate(columns):
            value = float(scores[r, c])
            if not np.isfinite(value):
                continue
            parts.append(
                f'<rect x="{LEFT + c * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{_colour(value / most)}"><title>layer {_text(name)}, {_text(column)}: '
                f"{value:+.4f}</title></rect>"
            )
    base = TOP + height + 10
    for c, column in enumerate(columns):
        x = LEFT + c * CELL + 6
        parts.append(
            f'<text x="{x}" y="{base}" transform="rotate(45 {x} {base})" fill="#333333">'
            f"{_text(column)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _text(text: str) -> str:
    """Text of a model or a person in XML: control characters are shown as spaces."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _colour(share: float) -> str:
    end = RED if share > 0 else BLUE
    mixed = (round(w + (e - w) * min(abs(share), 1.0)) for w, e in zip(WHITE, end, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
