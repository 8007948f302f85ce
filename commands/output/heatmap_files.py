"""The experts heatmap as a file: a plain SVG, CSV or Markdown table. Figures: commands.output.figure.

Every layer is scaled by its own largest value, as the screen does by default.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from commands.output.gradient import CIVIDIS, blend
from mlxfun.calibration.options import Metric
from mlxfun.errors import StateError, UsageError
from mlxfun.session.reports import HeatView

if TYPE_CHECKING:
    from mlxfun.arrays import Array

GONE = (224, 224, 228)
RED, GREEN, MAGENTA, BLUE = "#c0202c", "#0a7a32", "#a0149a", "#1560b0"
CELL = 14
TOP, LEFT = 46, 46
NARROWEST = 560


@dataclass(frozen=True, slots=True)
class Picture:
    """What to draw. values: float64 [L, E] in 0..1, each layer divided by its maximum."""

    heat: HeatView
    metric: Metric
    values: Array
    title: str


def picture(heat: HeatView | None, metric: Metric, title: str) -> Picture:
    """The picture of one metric. Raises StateError without statistics, UsageError for the metric."""
    if heat is None or not heat.metrics:
        raise StateError("no statistics to draw yet: run collect first")
    if metric not in heat.metrics:
        raise UsageError(f"{metric} is not measured; there are {', '.join(heat.metrics)}")
    score = np.where(heat.alive, np.nan_to_num(heat.metrics[metric]), 0.0)
    most = score.max(axis=1, keepdims=True)
    return Picture(heat, metric, score / np.where(most > 0, most, 1.0), title)


def colour(x: float) -> tuple[int, int, int]:
    """The colour for `x` in 0..1.

    >>> colour(0.0), colour(1.0)
    ((0, 34, 78), (254, 232, 56))
    """
    return blend(CIVIDIS, x)


def svg(drawn: Picture) -> str:
    """The heatmap with labelled layers and experts; each cell has a tooltip."""
    heat = drawn.heat
    rows, columns = drawn.values.shape
    width, height = max(LEFT + columns * CELL + 20, NARROWEST), TOP + rows * CELL + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{escape(drawn.title)}</text>',
        *(
            f'<text x="{LEFT + e * CELL + CELL / 2}" y="{TOP - 6}" text-anchor="middle">{e}</text>'
            for e in range(0, columns, max(1, columns // 32))
        ),
        *(
            f'<text x="{LEFT - 6}" y="{TOP + i * CELL + CELL - 4}" text-anchor="end">{layer}</text>'
            for i, layer in enumerate(heat.layers)
        ),
        *(_svg_cell(drawn, i, e) for i in range(rows) for e in range(columns)),
        *(
            f'<text x="{LEFT}" y="{height - 34 + 14 * i}">{escape(line)}</text>'
            for i, line in enumerate(_legend(drawn))
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _svg_cell(drawn: Picture, row: int, expert: int) -> str:
    heat = drawn.heat
    x, y = LEFT + expert * CELL, TOP + row * CELL
    red, green, blue = _fill(drawn, row, expert)
    value = heat.metrics[drawn.metric][row, expert]
    text = f"L{heat.layers[row]}:E{expert} {drawn.metric} {value:.4g}{_said(heat, row, expert)}"
    cell = (
        f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="#{red:02x}{green:02x}{blue:02x}"><title>{escape(text)}</title></rect>'
    )
    mark = _mark(heat, row, expert)
    if mark is None:
        return cell
    ink, shape = mark
    if shape == "cross":
        path = f"M{x + 2} {y + 2}l{CELL - 5} {CELL - 5}m0 {5 - CELL}l{5 - CELL} {CELL - 5}"
        return f'{cell}<path d="{path}" stroke="{ink}" stroke-width="2"/>'
    return (
        f'{cell}<rect x="{x + 1}" y="{y + 1}" width="{CELL - 3}" height="{CELL - 3}" fill="none" '
        f'stroke="{ink}" stroke-width="2"/>'
    )


def _fill(drawn: Picture, row: int, expert: int) -> tuple[int, int, int]:
    alive = bool(drawn.heat.alive[row, expert])
    return colour(float(drawn.values[row, expert])) if alive else GONE


def _mark(heat: HeatView, row: int, expert: int) -> tuple[str, str] | None:
    """(colour, shape) of an expert's most important mark, None for one without."""
    for mask, ink, shape in (
        (heat.condemned, RED, "cross"),
        (heat.activated, GREEN, "frame"),
        (heat.deactivated, MAGENTA, "frame"),
        (heat.protected, BLUE, "frame"),
    ):
        if mask[row, expert]:
            return ink, shape
    return None


def _said(heat: HeatView, row: int, expert: int) -> str:
    words = [name for name, mask in _masks(heat) if mask[row, expert]]
    return f" ({', '.join(words)})" if words else ""


def _masks(heat: HeatView) -> tuple[tuple[str, Array], ...]:
    return (
        ("pruned", ~heat.alive),
        ("to be pruned", heat.condemned),
        ("always selected", heat.activated),
        ("never selected", heat.deactivated),
        ("protected", heat.protected),
    )


def _legend(drawn: Picture) -> tuple[str, str]:
    return (
        f"{drawn.metric} of {drawn.heat.samples} samples, {drawn.heat.tokens:,} tokens, each layer "
        "by its largest. Red cross: to be pruned.",
        "Frames: green always selected, magenta never, blue protected. Pale: pruned.",
    )


def table(drawn: Picture) -> str:
    """All metrics of every expert, a line each, as CSV."""
    heat, out = drawn.heat, io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "expert", *heat.metrics, *(name for name, _ in _masks(heat))])
    for i, layer in enumerate(heat.layers):
        for e in range(heat.experts):
            figures = [repr(float(values[i, e])) for values in heat.metrics.values()]
            writer.writerow([layer, e, *figures, *(int(m[i, e]) for _, m in _masks(heat))])
    return out.getvalue()


def markdown(drawn: Picture) -> str:
    """One metric, layers by experts, as a Markdown table."""
    heat, values = drawn.heat, drawn.heat.metrics[drawn.metric]
    lines = [
        f"# {drawn.title}",
        "",
        _legend(drawn)[0].replace("Red cross", "Struck out"),
        "",
        "| layer | " + " | ".join(map(str, range(heat.experts))) + " |",
        "|---" * (heat.experts + 1) + "|",
    ]
    for i, layer in enumerate(heat.layers):
        cells = [
            f"{values[i, e]:.4g}" if heat.alive[i, e] else "pruned" for e in range(heat.experts)
        ]
        marked = [f"~~{text}~~" if heat.condemned[i, e] else text for e, text in enumerate(cells)]
        lines.append(f"| {layer} | " + " | ".join(marked) + " |")
    return "\n".join(lines) + "\n"
