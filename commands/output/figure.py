"""The experts heatmap as a figure for a paper: title, axes, legend, at any size. Needs Matplotlib.

Drawn without pyplot, so that no window system and no state of a thread is involved.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from commands.output.gradient import CIVIDIS, ON_DARK, ON_LIGHT, RGB
from commands.output.heatmap_files import Picture
from mlxfun.errors import StateError
from mlxfun.text import FIGURES_NEED, visible

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Palette = Literal["print", "light", "screen"]
PALETTES: tuple[Palette, ...] = get_args(Palette)
Scaling = Literal["linear", "log", "rank"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mlxfun", "pdf.fonttype": 42, "font.size": 8}
MM = 1 / 25.4
WIDTH = 180.0
"""Millimetres: a page's text over two columns."""
MOST_MARKED = 6000
"""Cells up to which each expert to be pruned gets a cross; a colour marks it in any case."""


@dataclass(frozen=True, slots=True)
class Look:
    """Colours of a palette. ramp: from low to high. paper, ink: background and text."""

    ramp: tuple[RGB, ...]
    paper: str
    ink: str
    goes: str
    gone: str
    unseen: str
    on: str = "#0a7a32"
    off: str = "#a0149a"
    kept: str = "#1560b0"


LOOKS: dict[Palette, Look] = {
    "print": Look(CIVIDIS, "#ffffff", "#111111", "#c0202c", "#d8d8dc", "#ffffff"),
    "light": Look(ON_LIGHT, "#ffffff", "#111111", "#b01020", "#d6d6d8", "#eee4ce"),
    "screen": Look(
        ON_DARK,
        "#0d1017",
        "#d8dee9",
        "#ff6060",
        "#262428",
        "#3a3228",
        "#60e682",
        "#f078e6",
        "#6aa8ff",
    ),
}


@dataclass(frozen=True, slots=True)
class FigureOptions:
    """width, height: millimetres, None for a height that suits the map. dpi: of a PNG. sort: the
    experts of each layer by score, highest first. title: "" for the picture's own."""

    palette: Palette = "print"
    width: float = WIDTH
    height: float | None = None
    dpi: int = 300
    scale: Scaling = "linear"
    sort: bool = False
    title: str = ""


def figure(drawn: Picture, kind: str, options: FigureOptions) -> bytes:
    """The figure as a file of `kind`: ".png", ".svg" or ".pdf".

    Raises StateError without Matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StateError(FIGURES_NEED) from error
    look, out = LOOKS[options.palette], io.BytesIO()
    rows, columns = drawn.values.shape
    height = options.height or min(240.0, max(60.0, options.width * 0.75 * rows / columns + 45))
    size = (options.width * MM, height * MM)
    # Text as text, and the same bytes for the same map.
    with rc_context(STYLE):
        page = Figure(figsize=size, facecolor=look.paper, layout="constrained")
        _draw(page, drawn, options)
        metadata = (
            {"Date": None} if kind == ".svg" else {"CreationDate": None} if kind == ".pdf" else {}
        )
        page.savefig(out, format=kind[1:], dpi=options.dpi, facecolor=look.paper, metadata=metadata)
    return out.getvalue()


def scaled(drawn: Picture, scale: Scaling) -> Array:
    """What is coloured, [L, E] in 0..1, NaN for pruned and never seen experts.

    linear: of its layer's largest; log: the same by its logarithm over three decades; rank: the
    share of its layer's experts that score less.
    """
    heat = drawn.heat
    shown = heat.alive & ~_unseen(drawn)
    values = drawn.values
    if scale == "log":
        values = np.clip(1 + np.log10(np.maximum(values, 1e-12)) / 3, 0, 1)
    elif scale == "rank":
        values = np.where(heat.alive, values, -1.0)
        below = (values[:, :, None] > values[:, None, :]) & heat.alive[:, None, :]
        values = below.sum(axis=2) / np.maximum(heat.alive.sum(axis=1, keepdims=True) - 1, 1)
    result: Array = np.where(shown, values, np.nan)
    return result


def _unseen(drawn: Picture) -> Array:
    freq = drawn.heat.metrics.get("freq")
    result: Array = (
        (freq == 0) & drawn.heat.alive if freq is not None else ~drawn.heat.alive & False
    )
    return result


def _draw(page: Any, drawn: Picture, options: FigureOptions) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    look, heat = LOOKS[options.palette], drawn.heat
    order = _order(drawn) if options.sort else None
    colours = [tuple(part / 255 for part in rgb) for rgb in look.ramp]
    ramp = LinearSegmentedColormap.from_list("experts", colours)
    axes = page.add_subplot(facecolor=look.gone)
    image = axes.imshow(
        _sorted(scaled(drawn, options.scale), order),
        cmap=ramp, vmin=0, vmax=1, aspect="auto", interpolation="none",
    )  # fmt: skip
    handles = _marks(axes, drawn, order, look)
    _axes(axes, drawn, options, look)
    bar = page.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label(_meaning(drawn, options.scale), color=look.ink)
    bar.ax.tick_params(colors=look.ink)
    if options.scale == "log":
        bar.set_ticks([0, 1 / 3, 2 / 3, 1], labels=["≤ 0.001", "0.01", "0.1", "1"])
    bar.outline.set_edgecolor(look.ink)
    if handles:
        page.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False,
            labelcolor=look.ink, fontsize="small",
        )  # fmt: skip
    title = _drawable(options.title or drawn.title)
    axes.set_title(title, color=look.ink, fontsize="medium", parse_math=False)
    caption = f"{heat.samples:,} samples, {heat.tokens:,} tokens"
    axes.set_xlabel(f"{axes.get_xlabel()}   ({caption})", color=look.ink)


def _axes(axes: Any, drawn: Picture, options: FigureOptions, look: Look) -> None:
    from matplotlib.ticker import MaxNLocator

    rows, columns = drawn.values.shape
    step = next((n for n in (1, 2, 4, 8, 16) if rows / n <= 24), 32)
    axes.set_yticks(range(0, rows, step), [str(n) for n in drawn.heat.layers[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylabel("decoder layer", color=look.ink)
    axes.set_xlabel("rank of the expert" if options.sort else "expert")
    axes.tick_params(colors=look.ink)
    for side in axes.spines.values():
        side.set_edgecolor(look.ink)


def _drawable(text: str) -> str:
    """Text whose control characters are shown by a sign that Matplotlib's own font has."""
    return "".join("\ufffd" if "\u2400" <= c < "\u2440" else c for c in visible(text))


def _marks(axes: Any, drawn: Picture, order: Array | None, look: Look) -> list[Any]:
    """Draw what is marked; the handles of the legend for what is there."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heat = drawn.heat
    handles: list[Any] = []
    areas = (("never seen", _unseen(drawn), look.unseen), ("pruned", ~heat.alive, look.gone))
    for name, mask, colour in areas:
        if mask.any():
            layer = np.zeros((*mask.shape, 4))
            layer[_sorted(mask, order).astype(bool)] = to_rgba(colour)
            axes.imshow(layer, aspect="auto", interpolation="none")
            handles.append(Patch(facecolor=colour, edgecolor=look.ink, linewidth=0.5, label=name))
    signs = (
        ("to be pruned", heat.condemned, "x", look.goes),
        ("forced on", heat.activated, "^", look.on),
        ("forced off", heat.deactivated, "v", look.off),
        ("protected", heat.protected, "D", look.kept),
    )
    for name, mask, sign, colour in signs:
        if not mask.any():
            continue
        if sign == "x":
            layer = np.zeros((*mask.shape, 4))
            layer[_sorted(mask, order).astype(bool)] = (*to_rgba(colour)[:3], 0.55)
            axes.imshow(layer, aspect="auto", interpolation="none")
        if sign != "x" or mask.size <= MOST_MARKED:
            rows, columns = np.nonzero(_sorted(mask, order))
            axes.scatter(columns, rows, marker=sign, s=9, linewidths=0.7, c=colour)
        if sign == "x" and mask.size > MOST_MARKED:
            handles.append(Patch(facecolor=colour, alpha=0.55, label=name))
        else:
            handles.append(Line2D([], [], linestyle="", marker=sign, color=colour, label=name))
    return handles


def _order(drawn: Picture) -> Array:
    """int [L, E]: the experts of each layer, highest score first, pruned ones last."""
    result: Array = np.argsort(
        np.where(drawn.heat.alive, -drawn.values, np.inf), axis=1, kind="stable"
    )
    return result


def _sorted(values: Array, order: Array | None) -> Array:
    return values if order is None else np.take_along_axis(values, order, axis=1)


def _meaning(drawn: Picture, scale: Scaling) -> str:
    if scale == "rank":
        return f"{drawn.metric}: share of its layer below"
    return f"{drawn.metric} / largest of its layer" + (" (log scale)" if scale == "log" else "")
