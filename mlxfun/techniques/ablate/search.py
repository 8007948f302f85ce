"""Seeded search (Parzen estimator) over source layer, position and strengths of an ablation.

Points. A point is a source layer, a position, and a strength for every component and layer: a
maximum per component times one profile over the layers, floor + (1 - floor) max(0, 1 - |l - c| / r)
around a centre c with reach r.

Sampler. The first points are a plain grid, every candidate layer at strengths 1 and 2 everywhere,
as far as `GRID_SHARE` of the trials allow, those with the largest difference of means first. Then
a tree-structured Parzen estimator after J. Bergstra et al., "Algorithms for Hyper-Parameter
Optimization" (2011), written here in its plainest form: the trials so far are split into the best
quarter and the rest; each parameter by itself gets a density from either part (numbers: a mixture
of normals around the values seen and a uniform part; choices: counts plus one); of `DRAWS` draws
from the densities of the good the one with the largest ratio good / rest is tried next.

Cost. refusals + false refusals + over(kl / max_kl) + over(text / max_text), with
over(u) = max(0, u - 1) + 0.1 min(1, u), `refusals` the expected share of harmful prompts that are
refused, and `text` what a token of plain text costs more, in nats: few refusals first, within the
bounds on the first-token KL and on text, and of equals the gentler one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, pi, sqrt
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mlxfun.model.components import Component
from mlxfun.techniques.ablate.options import Position

if TYPE_CHECKING:
    from mlxfun.techniques.ablate.plan import Strengths

T = TypeVar("T")

GRID_SHARE = 0.4
GOOD_SHARE = 0.25
DRAWS = 24
OWN_STRENGTHS = (0.7, 1.0, 0.5, 0.35, 1.4, 2.0)
MOST = 3.0
"""The largest strength that is tried. 2 turns a component's sign."""

DAMAGE = 0.5
"""KL, in nats, beyond which a model is damaged: no such point is offered."""

OWN = -1
"""As a source: each part's own difference, for an oblique projection."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an edit should stay within, in nats. kl: first-token KL on harmless prompts; text: what
    a token of plain text may cost more.
    """

    kl: float
    text: float


@dataclass(frozen=True, slots=True)
class Space:
    """What may be chosen. layers: number of decoder layers; sources: candidates, best first, or OWN
    alone.
    """

    layers: int
    sources: tuple[int, ...]
    positions: tuple[Position, ...]
    components: tuple[Component, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One choice. strengths: the maximum of each component, in the order of the space."""

    source: int
    position: Position
    strengths: tuple[float, ...]
    centre: float
    reach: float
    floor: float

    def profile(self, layer: int) -> float:
        """The share of the maximum that applies to a layer.

        >>> Point(2, "last", (1.0,), centre=2, reach=4, floor=0.5).profile(4)
        0.75
        """
        bump = max(0.0, 1 - abs(layer - self.centre) / self.reach)
        return self.floor + (1 - self.floor) * bump

    def spread(self, space: Space) -> Strengths:
        """{component: {layer: strength}}, to three digits."""
        return {
            part: {i: round(most * self.profile(i), 3) for i in range(space.layers)}
            for part, most in zip(space.components, self.strengths, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Trial:
    """A point and what it does: expected share of refusals, KL in nats, share of harmless
    prompts that would be refused, what a token of plain text costs more, in nats.
    """

    point: Point
    refusals: float
    kl: float
    false_refusals: float = 0.0
    text: float = 0.0

    def within(self, bounds: Bounds) -> bool:
        """Whether it stays within the bounds."""
        return self.kl <= bounds.kl and self.text <= bounds.text

    def cost(self, bounds: Bounds) -> float:
        """See the module's text."""
        used = (_used(self.kl, bounds.kl), _used(self.text, bounds.text))
        over = sum(max(0.0, u - 1) + 0.1 * min(1.0, u) for u in used)
        return self.refusals + self.false_refusals + over


def _used(value: float, bound: float) -> float:
    """How much of a bound is used."""
    return max(0.0, value) / bound if np.isfinite(value) else 1e6


Judge = Callable[[Point], Trial]


def search(space: Space, judge: Judge, trials: int, bounds: Bounds, seed: int) -> tuple[Trial, ...]:
    """Every trial, in order. The same arguments and judgements give the same trials."""
    rng = np.random.default_rng(seed)
    done: list[Trial] = []
    first = grid(space)[: max(1, round(trials * GRID_SHARE))]
    for number in range(trials):
        point = first[number] if number < len(first) else suggest(space, done, bounds, rng)
        done.append(judge(point))
    return tuple(done)


def grid(space: Space) -> list[Point]:
    """Every source and position at the same strength on everything, in the order of the sources: 1
    and 2; of each part's own difference 0.5 to 2, the middle first."""
    strengths = OWN_STRENGTHS if space.sources == (OWN,) else (1.0, 2.0)
    return [
        Point(source, position, (strength,) * len(space.components), 0.0, 1.0, 1.0)
        for source in space.sources
        for position in space.positions
        for strength in strengths
    ]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other one beats in refusals, KL and cost of plain text alike, gentlest first.

    Left out: what damages the model, and what edits nothing.
    """
    allowed = [t for t in trials if max(t.kl, t.text) <= DAMAGE and any(t.point.strengths)]
    best: list[Trial] = []
    for trial in sorted(allowed, key=lambda t: (t.kl, *_figures(t))):
        if not any(_no_worse(other, trial) for other in best):
            best.append(trial)
    return best


def _figures(trial: Trial) -> tuple[float, float, float]:
    return trial.refusals + trial.false_refusals, trial.kl, max(0.0, trial.text)


def _no_worse(one: Trial, other: Trial) -> bool:
    return all(a <= b for a, b in zip(_figures(one), _figures(other), strict=True))


# -- the sampler ------------------------------------------------------------------------------

_NUMBERS: dict[str, Callable[[Space], tuple[float, float]]] = {
    "centre": lambda space: (0.0, float(space.layers - 1)),
    "reach": lambda space: (1.0, float(max(2, space.layers))),
    "floor": lambda _: (0.0, 1.0),
}


def suggest(space: Space, done: Sequence[Trial], bounds: Bounds, rng: np.random.Generator) -> Point:
    """The next point to try."""
    ranked = sorted(done, key=lambda trial: trial.cost(bounds))
    split = max(1, round(len(ranked) * GOOD_SHARE))
    good = [trial.point for trial in ranked[:split]]
    rest = [trial.point for trial in ranked[split:]]
    best, highest = good[0], -np.inf
    for _ in range(DRAWS):
        drawn = _draw(space, good, rng)
        ratio = _log_density(space, good, drawn) - _log_density(space, rest, drawn)
        if ratio > highest:
            best, highest = drawn, ratio
    return best


def _draw(space: Space, good: Sequence[Point], rng: np.random.Generator) -> Point:
    """One point, each parameter drawn from its own density among the good."""

    def number(name: str) -> float:
        return _draw_number(_NUMBERS[name](space), [getattr(p, name) for p in good], rng)

    return Point(
        _draw_choice(space.sources, [p.source for p in good], rng),
        _draw_choice(space.positions, [p.position for p in good], rng),
        tuple(
            _draw_number((0.0, MOST), [p.strengths[i] for p in good], rng)
            for i in range(len(space.components))
        ),
        number("centre"),
        number("reach"),
        number("floor"),
    )


def _log_density(space: Space, points: Sequence[Point], at: Point) -> float:
    total = _log_choice(space.sources, [p.source for p in points], at.source)
    total += _log_choice(space.positions, [p.position for p in points], at.position)
    for i, value in enumerate(at.strengths):
        total += _log_number((0.0, MOST), [p.strengths[i] for p in points], value)
    for name, bounds in _NUMBERS.items():
        seen = [getattr(p, name) for p in points]
        total += _log_number(bounds(space), seen, getattr(at, name))
    return total


def _draw_choice(options: Sequence[T], seen: Sequence[T], rng: np.random.Generator) -> T:
    weights = np.array([1.0 + seen.count(option) for option in options])
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]


def _log_choice(options: Sequence[T], seen: Sequence[T], value: T) -> float:
    return log((1.0 + seen.count(value)) / (len(options) + len(seen)))


def _width(bounds: tuple[float, float], count: int) -> float:
    """Of the normals around values seen: narrower the more there are."""
    return (bounds[1] - bounds[0]) / (2 + sqrt(count))


def _draw_number(
    bounds: tuple[float, float], seen: Sequence[float], rng: np.random.Generator
) -> float:
    low, high = bounds
    which = int(rng.integers(len(seen) + 1))
    if which == len(seen):
        return float(rng.uniform(low, high))
    return float(np.clip(rng.normal(seen[which], _width(bounds, len(seen))), low, high))


def _log_number(bounds: tuple[float, float], seen: Sequence[float], value: float) -> float:
    low, high = bounds
    width = _width(bounds, len(seen))
    normals = sum(exp(-0.5 * ((value - s) / width) ** 2) for s in seen) / (width * sqrt(2 * pi))
    return log((normals + 1 / (high - low)) / (len(seen) + 1))
