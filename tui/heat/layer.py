"""The view of one layer, a line per expert. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from tui.heat.metrics import DIFFERENCE
from tui.heat.model import LEVELS, PRUNED, HeatModel
from tui.heat.words import figure, spread

HALF, MOST = 0.5, 0.9


@dataclass(frozen=True, slots=True, eq=False)
class LayerModel:
    """What the view of one layer shows; all arrays are by expert number, [E].

    layer: the decoder layer. rows: the experts, int, in the order of the lines. kinds: int, see
    tui.heat.model. values: float64, the metric, None without statistics. shares: of the
    layer's total, 0 for pruned ones; below: the same summed over it and all experts with less.
    chosen: how often it was routed to, or None; weight: its mean routing weight then, NaN for
    never, or None. topics: what each expert serves, "" for nothing known; () if none is known.
    """

    layer: int
    metric: str
    rows: Array
    kinds: Array
    values: Array | None
    shares: Array | None
    below: Array | None
    chosen: Array | None
    weight: Array | None
    topics: tuple[str, ...]
    summary: str

    def cell(self, title: str, expert: int) -> str:
        """The figure of one expert in the column `title`."""
        if self.kinds[expert] == PRUNED:
            return "pruned" if title == "share" else ""
        source = {
            "share": self.shares,
            "cumulative": self.below,
            "chosen": self.chosen,
            "weight": self.weight,
            "score": self.values,
        }[title]
        assert source is not None
        value = float(source[expert])
        if np.isnan(value):
            return "-"  # never chosen: no mean
        if title in ("share", "cumulative"):
            return f"{value:.1%}"
        return f"{value:.3f}" if title == "weight" else figure(value)


def layer_model(model: HeatModel, position: int) -> LayerModel:
    """The view of the MoE layer at `position` of a map."""
    codes, order = model.codes[position], None if model.order is None else model.order[position]
    kinds = codes // LEVELS
    if order is not None:
        kinds = np.empty_like(kinds)
        kinds[order] = codes // LEVELS
    rows = np.arange(model.experts) if order is None else order
    alive = model.heat.alive[position]
    values = None if model.values is None else model.values[position]
    shares = below = None
    if values is not None and not model.metric.startswith(DIFFERENCE):
        shares, below = share_of(values, alive)
    chosen = None if model.freq is None else model.freq[position]
    return LayerModel(
        layer=model.layers[position],
        metric=model.metric,
        rows=rows,
        kinds=kinds,
        values=values,
        shares=shares,
        below=below,
        chosen=chosen,
        weight=_mean_weight(model, position, chosen),
        topics=_topics(model, position),
        summary=_summary(model, position, shares),
    )


def _topics(model: HeatModel, position: int) -> tuple[str, ...]:
    """The topics of one layer's experts; pruned and never seen ones have none."""
    known, layer = model.heat.topics, model.layers[position]
    seen = model.heat.alive[position]
    if model.freq is not None:
        seen = seen & (model.freq[position] > 0)
    words = tuple(known.get((layer, e), "") if seen[e] else "" for e in range(model.experts))
    return words if any(words) else ()


def share_of(values: Array, alive: Array) -> tuple[Array, Array]:
    """(share of the total, share of it and all unpruned experts with less), [E].

    >>> share_of(np.array([1.0, 5.0, 2.0, 2.0]), np.array([True, True, True, False]))
    (array([0.125, 0.625, 0.25 , 0.   ]), array([0.125, 1.   , 0.375, 0.   ]))
    """
    kept = np.where(alive, np.nan_to_num(values), 0.0)
    total = float(kept.sum())
    shares = kept / total if total > 0 else np.zeros_like(kept)
    rising = np.argsort(kept, kind="stable")
    below = np.zeros_like(shares)
    below[rising] = np.cumsum(shares[rising])
    return shares, np.where(alive, below, 0.0)


def busiest(shares: Array, part: float) -> int:
    """How many of the busiest experts together have at least `part` of the total.

    >>> busiest(np.array([0.125, 0.625, 0.25]), 0.5), busiest(np.array([0.125, 0.625, 0.25]), 0.9)
    (1, 3)
    """
    done = np.cumsum(np.sort(shares)[::-1])
    return int((done < part - 1e-12).sum()) + 1


def _mean_weight(model: HeatModel, position: int, chosen: Array | None) -> Array | None:
    """The mean routing weight of each expert when chosen, None without a calibration."""
    weighted = model.heat.metrics.get("weighted_freq")
    if weighted is None or chosen is None or model.live:
        return None
    total = weighted[position]
    mean: Array = np.divide(total, chosen, out=np.full(total.shape, np.nan), where=chosen > 0)
    return mean


def _summary(model: HeatModel, position: int, shares: Array | None) -> str:
    heat = model.heat
    alive, condemned = heat.alive[position], heat.condemned[position]
    count, going = int(alive.sum()), int(condemned.sum())
    name = f"layer {model.layers[position]}"
    if shares is None or not shares.any():
        return f"{name} · {count} experts" + (f" · {going} to prune" if going else "")
    kept = shares[alive]
    half, most = busiest(kept, HALF), busiest(kept, MOST)
    parts = [name, f"{going} to prune with {shares[condemned].sum():.1%}"] if going else [name]
    parts += [
        f"balance {spread(kept):.0%}",
        f"{half} of {count} experts have 50 % of the activations, {most} have 90 %",
    ]
    return " · ".join(parts)
