"""The heatmap as text: a line about the cell under the cursor, and the whole map as a table."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from rich.text import Text

from mlxfun.arrays import Array
from mlxfun.events import ON_DISK
from mlxfun.steering.reports import SteerReport
from tui.heat.metrics import DIFFERENCE
from tui.heat.model import HeatModel
from tui.text import ranges


def figure(value: float) -> str:
    """`value` in at most seven characters.

    >>> figure(12345.6), figure(0.03125), figure(3.0), figure(0.0), figure(1e9)
    ('12,346', '0.0312', '3', '0', '1.0e+09')
    """
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rank(values: Array, alive: Array, expert: int) -> tuple[int, int]:
    """(rank of `expert` among the unpruned experts of its layer, 1 the highest; their number)."""
    better = int((values[alive] > values[expert]).sum())
    return better + 1, int(alive.sum())


def status(
    model: HeatModel, position: int, expert: int, steering: SteerReport | None = None
) -> str:
    """The marks of an expert in words, "" without any."""
    heat = model.heat
    levels = steering.levels.get(model.layers[position], {}) if steering is not None else {}
    level = levels.get(expert)
    words = [
        word
        for flags, word in (
            (heat.condemned, "pruned by the staged plan"),
            (heat.protected, "protected"),
            (heat.activated, "forced on" if level is None else f"bias +{level:g}"),
            (
                heat.deactivated,
                "forced off" if level is None else f"bias {level:g}",
            ),
        )
        if flags[position, expert]
    ]
    if heat.held is not None and heat.held[position, expert] == ON_DISK:
        words.append("on disk, not in memory")
    return ", ".join(words)


def explain(model: HeatModel, cursor: tuple[int, int], steering: SteerReport | None = None) -> str:
    """One line about the expert at `cursor` = (position of the MoE layer, expert)."""
    position, expert = cursor
    name = f"L{model.layers[position]}:E{expert}"
    if not model.heat.alive[position, expert]:
        return f"{name} pruned; undo brings it back"
    said = status(model, position, expert, steering)
    tail = f" · {said}" if said else ""
    topic = model.heat.topics.get((model.layers[position], expert), "")
    if topic:
        tail = f" · {topic}{tail}"
    if model.values is None:
        return f"{name} not measured yet{tail}"
    values, alive = model.values[position], model.heat.alive[position]
    if model.metric.startswith(DIFFERENCE):
        return f"{name}{tail} · {apart(float(values[expert]), model.metric)}"
    if model.freq is not None and model.freq[position, expert] == 0:
        return f"{name} never seen in {model.tokens:,} tokens" + (f" · {said}" if said else "")
    place, of = rank(values, alive, expert)
    total = float(values[alive].sum())
    share = f", {values[expert] / total:.1%} of its layer" if total > 0 else ""
    return f"{name}{tail} · {model.metric} {figure(float(values[expert]))}, rank {place} of {of}{share}"


def apart(value: float, metric: str) -> str:
    """A difference of shares in words.

    >>> apart(0.0214, "A-B freq"), apart(0.0, "A-B freq")
    ("2.14 points more of its layer's freq in A than in B", 'the same share of freq in A and B')
    """
    name = metric.removeprefix(DIFFERENCE)
    if value == 0:
        return f"the same share of {name} in A and B"
    more, less = ("A", "B") if value > 0 else ("B", "A")
    points = f"{abs(value) * 100:.2f}"
    return f"{points} points more of its layer's {name} in {more} than in {less}"


def spread(values: Array) -> float:
    """How evenly values are distributed, 0..1: exp(entropy) over the number of experts."""
    total = float(values.sum())
    if total <= 0 or values.size == 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()) / values.size)


def table(model: HeatModel, each: int = 3) -> Table:
    """The map as a table, one line a layer: experts to be pruned, those with least and most.

    balance: how evenly the metric is distributed over the layer, see `spread`.
    """
    out = Table(box=None, padding=(0, 1), header_style="bold", show_edge=False)
    for title in ("layer", "kept", "never seen", "balance"):
        out.add_column(title, justify="right", no_wrap=True)
    for title in ("to prune", f"least {model.metric}", f"most {model.metric}", "steered"):
        out.add_column(title, no_wrap=True)
    for position, layer in enumerate(model.layers):
        alive = np.flatnonzero(model.heat.alive[position])
        goes = Text(ranges(np.flatnonzero(model.heat.condemned[position]).tolist()) or "-")
        unseen, even, least, most = _measured(model, position, alive, each)
        steered = Text(_steered(model, position) or "-")
        out.add_row(str(layer), str(alive.size), unseen, even, goes, least, most, steered)
    return out


def _measured(model: HeatModel, position: int, alive: Array, each: int) -> tuple[Text, ...]:
    """The cells unseen, even, least and most of one layer."""
    if model.values is None:
        return Text("-"), Text("-"), Text("-"), Text("-")
    values = model.values[position]
    seen = values if model.freq is None else model.freq[position]
    order = alive[np.argsort(values[alive], kind="stable")]
    least, most = (
        Text(", ".join(f"{e} ({figure(float(values[e]))})" for e in some))
        for some in (order[:each], order[::-1][:each])
    )
    never = int((seen[alive] == 0).sum())
    return Text(str(never)), Text(f"{spread(values[alive]):.0%}"), least, most


def _steered(model: HeatModel, position: int) -> str:
    heat = model.heat
    up = [f"+{e}" for e in np.flatnonzero(heat.activated[position])]
    return " ".join(up + [f"-{e}" for e in np.flatnonzero(heat.deactivated[position])])
