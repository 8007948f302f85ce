"""The variants of a recipe as a figure: loss against size. Needs Matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from mlxfun.session.measuring.variants import Target, Variant

SIZE = (180 / 25.4, 105 / 25.4)
"""Inches: as wide as a page's text."""
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mlxfun", "font.size": 8}
"""Text as text, and the same bytes for the same variants."""
INK, QUIET, KEPT, LIMIT = "#111111", "#7a8794", "#c2410c", "#2563eb"
MOST_TEXT = 90
"""Columns of the line below the title."""


def loss_svg(variants: Sequence[Variant], target: Target, kept: int | None) -> bytes:
    """The figure as an SVG document, the same bytes for the same variants. Needs Matplotlib."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context(STYLE):
        loss_plot(variants, target, kept).savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def loss_plot(variants: Sequence[Variant], target: Target, kept: int | None) -> Any:
    """The Matplotlib figure: a point for each measured variant, the one kept in a colour of its own,
    the limit as a dashed line. x: megabytes as saved; y: mean KL from the checkpoint, nats a token.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=SIZE, layout="constrained")
    axes = page.add_subplot()
    for number, variant in enumerate(variants):
        if not variant.measured or variant.kl is None:
            continue
        place = (variant.bytes / 1e6, variant.kl)
        chosen = number == kept
        axes.scatter(*place, s=60 if chosen else 24, c=KEPT if chosen else QUIET, zorder=3)
        axes.annotate(
            short(variant), place, xytext=(6, 3), textcoords="offset points", fontsize="small",
            color=KEPT if chosen else INK, parse_math=False,
        )  # fmt: skip
    if target.of == "bytes":
        axes.axvline(target.limit / 1e6, color=LIMIT, linestyle="--", linewidth=1)
    else:
        axes.axhline(target.limit, color=LIMIT, linestyle="--", linewidth=1)
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e2e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("size as saved (MB)")
    axes.set_ylabel("KL from the checkpoint (nats per token)")
    title = f"Loss against size; dashed: {target}"
    if kept is not None:
        line = _printable(variants[kept].line)
        title += f"\nkept: {line if len(line) <= MOST_TEXT else line[: MOST_TEXT - 1] + '…'}"
    axes.set_title(title, fontsize="medium", parse_math=False)
    return page


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def short(variant: Variant) -> str:
    """The techniques of a variant: its points are told apart by them.

    >>> short(Variant("narrow --fraction 0.25 then bits --to-bytes 5MB", 1, 0.1, 1.0, 1.0))
    'narrow + bits'
    """
    return _printable(" + ".join(step.split(" ", 1)[0] for step in variant.line.split(" then ")))
