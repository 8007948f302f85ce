"""From statistics to heatmap cells: each expert gets a kind and a heat level.

A cell's code is `kind * LEVELS + level`: a small integer, so that pooling, comparing frames and
looking up what to draw are array operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mlxfun.arrays import Array
from mlxfun.events import ON_DISK, READ
from mlxfun.session.reports import HeatView
from tui.heat.metrics import DIFFERENCE, chosen_metric, empty_heat, metric_values
from tui.heat.order import order_of
from tui.state.app_state import AppState, HeatOptions, Scale

LEVELS = 24
# Ordered by what must stay visible when several experts share one cell: the later one wins.
(PRUNED, UNSEEN, ABSENT, HEAT, APART, PROTECTED, CONDEMNED, SHARE, DOWN, UP, LIT, LOADED, CURSOR,
 VOID) = range(14)  # fmt: skip
# ABSENT: not in memory; LOADED: read a moment ago, because it was wanted.
# SHARE: of experts in one cell some are to be pruned; its level is the fraction.
RAMPED = (HEAT, APART, PROTECTED, CONDEMNED, DOWN, UP)
STEPS = LEVELS // 2
"""Levels of a difference on either side. A level is `2 * step + (more in A)`, so that in a pooled
cell the greater difference wins, whichever way it goes."""


@dataclass(frozen=True, slots=True, eq=False)
class HeatModel:
    """What the heatmap draws. values: float64 [L, E], None without statistics.

    codes: int32 [L, E], columns as shown; freq: [L, E] or None; metrics: the names that can be
    chosen now; order: the expert in each column, int [L, E], None while columns are numbers.
    """

    layers: tuple[int, ...]
    experts: int
    codes: Array
    values: Array | None
    freq: Array | None
    metric: str
    metrics: tuple[str, ...]
    heat: HeatView
    live: bool
    samples: int
    tokens: int
    order: Array | None = None
    scale: Scale = "linear"

    @property
    def shown(self) -> frozenset[int]:
        """The kinds of cells that there are."""
        return frozenset(np.unique(self.codes // LEVELS).tolist())


def heat_model(state: AppState) -> HeatModel | None:
    """The heatmap of `state`, None without a model."""
    heat = state.view.heat or empty_heat(state.view)
    if heat is None:
        return None
    if state.draft is not None:
        heat = replace(heat, condemned=state.draft.pruned)
    choices = metric_values(state, heat)
    metric = chosen_metric(state.heat.metric, tuple(choices), answering=state.lit is not None)
    values = choices.get(metric)
    freq = choices.get("freq")
    apart = metric.startswith(DIFFERENCE)
    seen = None if values is None else (values if freq is None else freq) > 0
    if apart and values is not None:
        codes = encode_apart(heat, values, state.heat)
    else:
        codes = encode(heat, values, seen, state.heat)
    held = heat.held if state.held is None else state.held
    if held is not None and held.shape == codes.shape:
        heat = replace(heat, held=held)
        dim(codes, held)
    if state.lit is not None:
        light(codes, state.lit)
    if held is not None and held.shape == codes.shape:
        codes[(held == READ) & (codes // LEVELS != PRUNED)] = LOADED * LEVELS
    frame = state.frame
    order = order_of(state)
    if order is not None:
        codes = np.take_along_axis(codes, order, axis=1)
    return HeatModel(
        layers=heat.layers,
        experts=heat.experts,
        codes=codes,
        values=values,
        freq=freq,
        metric=metric,
        metrics=tuple(choices),
        heat=heat,
        live=frame is not None or state.lit is not None,
        samples=frame.samples if frame else heat.samples,
        tokens=frame.tokens if frame else heat.tokens,
        order=order,
        scale="linear" if values is None else scale_for(_scaled(heat, values), state.heat),
    )


def _scaled(heat: HeatView, values: Array) -> Array:
    """What the scale is taken of: pruned experts do not set it."""
    scaled: Array = np.where(heat.alive, np.nan_to_num(np.abs(values)), 0.0)
    return scaled


TYPICAL_LINEAR, TYPICAL_LOG = 0.15, 0.003
"""The median of scores over their maximum from which on a linear, a logarithmic scale shows them."""


def scale_for(values: Array, options: HeatOptions) -> Scale:
    """The scale of `values` [L, E]: the chosen one, or by how skewed the values are.

    A typical expert (the median of those above zero) far below the greatest is black on a linear
    scale, and on a logarithmic one of three decades if it is below even that.
    """
    if options.scale != "auto":
        return options.scale
    ratio = values / _top(values, options)
    ratio = ratio[ratio > 0]
    typical = float(np.median(ratio)) if ratio.size else 1.0
    return "linear" if typical >= TYPICAL_LINEAR else "log" if typical >= TYPICAL_LOG else "rank"


def _top(values: Array, options: HeatOptions) -> Array:
    """The greatest of each layer, or of the model; 1 where all are zero."""
    top = values.max(axis=1, keepdims=True) if options.per_layer else values.max(initial=0.0)
    found: Array = np.where(top > 0, top, 1.0)
    return found


def levels(values: Array, options: HeatOptions, steps: int = LEVELS) -> Array:
    """`values` [L, E] as steps, int32: 0 for zero or less, steps - 1 for the greatest.

    Linear: x = v / max. Logarithmic: x = log(1 + 999 v / max) / log(1000), three decades. Rank:
    x = the share of values that are smaller. The maximum, or what is ranked, is each layer's own or
    the whole model's.
    """
    values = np.nan_to_num(np.maximum(values, 0.0))
    scale = scale_for(values, options)
    if scale == "rank":
        x = _ranked(values) if options.per_layer else _ranked(values.reshape(1, -1))
        x = x.reshape(values.shape)
    else:
        x = values / _top(values, options)
        x = np.log1p(999.0 * x) / np.log(1000.0) if scale == "log" else x
    return np.minimum((x * steps).astype(np.int32), steps - 1)


def _ranked(values: Array) -> Array:
    """The share of each row's other values that are smaller, 0 for a zero."""
    order = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    share: Array = np.where(values > 0, order / max(1, values.shape[1] - 1), 0.0)
    return share


def encode_apart(heat: HeatView, values: Array, options: HeatOptions) -> Array:
    """Cell codes int32 [L, E] of differences, in STEPS steps on either side of 0."""
    step = levels(np.abs(values), options, STEPS)
    kinds, level = _kinds(heat, APART), 2 * step + (values > 0)
    level[kinds == PRUNED] = 0
    codes: Array = kinds * LEVELS + level
    return codes


def _kinds(heat: HeatView, plain: int) -> Array:
    """The kind of each expert, int32 [L, E]; `plain` for those without a mark."""
    kinds = np.full(heat.alive.shape, plain, np.int32)
    for flags, kind in (
        (heat.protected, PROTECTED),
        (heat.condemned, CONDEMNED),
        (heat.deactivated, DOWN),
        (heat.activated, UP),
        (~heat.alive, PRUNED),
    ):
        kinds[flags] = kind
    return kinds


def encode(heat: HeatView, values: Array | None, seen: Array | None, options: HeatOptions) -> Array:
    """Cell codes int32 [L, E]. seen: bool [L, E], the experts that any token was routed to."""
    kinds = _kinds(heat, HEAT)
    if seen is None or values is None:
        kinds[kinds == HEAT] = UNSEEN
        level = np.zeros(kinds.shape, np.int32)
    else:
        kinds[~seen & (kinds == HEAT)] = UNSEEN
        level = levels(np.where(heat.alive, values, 0.0), options)
    level[(kinds == UNSEEN) | (kinds == PRUNED)] = 0
    return kinds * LEVELS + level


def dim(codes: Array, held: Array) -> None:
    """Mark in `codes` [L, E] the experts that are on disk only, and have no other mark; they keep
    their heat. held: int8 [L, E], see mlxfun.events.ON_DISK."""
    kinds, level = np.divmod(codes, LEVELS)
    plain = (held == ON_DISK) & ((kinds == HEAT) | (kinds == UNSEEN))
    codes[plain] = ABSENT * LEVELS + level[plain]


def light(codes: Array, experts: Array) -> None:
    """Mark in `codes` [L, E] the experts [L, K] of the newest token; -1 is none."""
    rows, slots = np.nonzero((experts >= 0) & (experts < codes.shape[1]))
    inside = rows < codes.shape[0]
    codes[rows[inside], experts[rows, slots][inside]] = LIT * LEVELS
