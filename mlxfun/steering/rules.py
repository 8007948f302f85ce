"""Steering rules applied to router scores at run time: force experts into or out of the top-k.

Three rules, the first two chosen by the router:

* *logits* (softmax routers, and sigmoid routers without a selection bias), SteerMoE's rule
  (arXiv 2509.09660): an activated expert's logit becomes the row's maximum plus a margin, a
  deactivated one's the row's minimum minus a margin, then the model routes normally. Softmax is
  invariant to a shift of the row, so the rule is the same on log-softmax scores and on logits.
* *bias* (routers with a selection bias): the bias is replaced for selection only, so the weights
  stay the model's own. Grouped routers fill losing groups with 0.0, and a deactivated expert must
  lose even to that: live biases are shifted up by a constant, which changes no choice between live
  experts, until every live score is above the fill.

* *additive*, on request: a boost is added for activated experts and a mask for deactivated ones, to
  the selection bias where there is one and to the logits otherwise. On logits it changes the
  weights too (one expert far above the others takes all of them), so moderate values are gentler
  than SteerMoE's rule and large ones harsher. Ties between live experts are decided as before.

Beside either rule single experts can have a *level*, a fader: a number that is added to their
selection bias or logit before the rule is applied.

An empty configuration installs nothing, so it changes nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from math import log
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxfun.hooks.routing import LogitsRule, Taps
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import Resident
from mlxfun.model.live_experts import LiveExperts
from mlxfun.steering.options import MapInForce, SteerRule
from mlxfun.steering.reports import StandingView, SteerReport
from mlxfun.tracing.standing import Placed

Mask = NDArray[np.bool_]

Cells = Collection[tuple[int, int]]
"""(decoder layer, expert) pairs."""

MARGIN = 0.01
"""SteerMoE's distance from the row's extreme."""

GROUP_MARGIN = log(2) + MARGIN
"""A group's score is the sum of its top two; e^(max + ln 2) exceeds any two probabilities."""

BOOST, MASK = 2.0, -1e4
"""What the additive rule adds by default: e^2 times the odds, and never."""


FORCED = 1e4
"""Selection bias of an activated expert (deactivated: its negative); scores are of order one."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What is steered. Both sets: {decoder layer: experts in checkpoint numbers}.

    rule: "steermoe" or "additive", which adds boost_value or mask_value. levels: {decoder layer:
    {expert: what is added to its score}}. maps: the reports that some of the sets come from; they
    say where it is from and steer nothing. interventions: those that stand in every forward.
    """

    activate: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    deactivate: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rule: SteerRule = "steermoe"
    boost_value: float = BOOST
    mask_value: float = MASK
    levels: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    maps: tuple[MapInForce, ...] = ()
    interventions: tuple[Placed, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing is steered."""
        experts = any(any(s.values()) for s in (self.activate, self.deactivate, self.levels))
        return not experts and not self.interventions

    @property
    def key(self) -> str:
        """Identity for caches; "" when nothing is steered."""
        if self.empty:
            return ""
        values = (self.boost_value, self.mask_value) if self.rule == "additive" else ()
        sets = (sorted(self.activate.items()), sorted(self.deactivate.items()))
        faders = [(layer, sorted(some.items())) for layer, some in sorted(self.levels.items())]
        standing = [one.key for one in self.interventions]
        text = repr((*sets, self.rule, *values, *faders, *standing))
        return blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def brief(self) -> str:
        """A few words: "3 forced on, 1 forced off, 2 biased"; "" when nothing is steered.

        >>> Steering(activate={3: (7,)}, levels={5: {1: 0.5, 2: -1.0}}).brief
        '1 forced on, 2 biased'
        """
        parts = (
            (self.activate, "forced on"),
            (self.deactivate, "forced off"),
            (self.levels, "biased"),
        )
        counts = [(sum(map(len, sets.values())), words) for sets, words in parts]
        said = [f"{count} {words}" for count, words in counts if count]
        return ", ".join([*said, *(one.described for one in self.interventions)])

    def report(self, notices: tuple[str, ...] = ()) -> SteerReport:
        """The steering as plain data."""
        return SteerReport(
            dict(self.activate),
            dict(self.deactivate),
            notices,
            self.rule,
            self.boost_value,
            self.mask_value,
            {layer: dict(levels) for layer, levels in self.levels.items()},
            self.maps,
            tuple(
                StandingView(
                    one.name, one.change.described, one.source, one.key, one.change.strength
                )
                for one in self.interventions
            ),
        )

    def with_more(
        self, activate: Mapping[int, Sequence[int]], deactivate: Mapping[int, Sequence[int]]
    ) -> Steering:
        """This steering with more experts; a newer wish replaces an older opposite one."""
        up = {layer: set(experts) for layer, experts in self.activate.items()}
        down = {layer: set(experts) for layer, experts in self.deactivate.items()}
        for wish, same, other in ((activate, up, down), (deactivate, down, up)):
            for layer, experts in wish.items():
                same.setdefault(layer, set()).update(experts)
                other.setdefault(layer, set()).difference_update(experts)
        return replace(self, activate=_frozen(up), deactivate=_frozen(down))

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        """(decoder layer, expert) of all that are steered."""
        parts = (self.activate, self.deactivate, self.levels)
        return frozenset((layer, e) for sets in parts for layer, some in sets.items() for e in some)

    def shared(self, other: Steering) -> frozenset[tuple[int, int]]:
        """(decoder layer, expert) of all that both steer in the same way, and to the same level."""
        return frozenset(
            cell for cell in self.cells & other.cells if self._way(*cell) == other._way(*cell)
        )

    def _way(self, layer: int, expert: int) -> tuple[bool, bool, float]:
        up, down = (expert in side.get(layer, ()) for side in (self.activate, self.deactivate))
        return up, down, self.levels.get(layer, {}).get(expert, 0.0)

    def without(self, gone: Cells) -> Steering:
        """This steering without some experts."""
        up, down = (
            _frozen({ly: {e for e in some if (ly, e) not in gone} for ly, some in sets.items()})
            for sets in (self.activate, self.deactivate)
        )
        maps = (
            replace(use, cells=tuple(cell for cell in use.cells if cell not in gone))
            for use in self.maps
        )
        kept = tuple(use for use in maps if use.cells)
        silent = {ly: {e: 0.0 for e in some if (ly, e) in gone} for ly, some in self.levels.items()}
        return replace(self, activate=up, deactivate=down, maps=kept).with_levels(silent)

    def with_levels(self, levels: Mapping[int, Mapping[int, float]]) -> Steering:
        """This steering with faders set anew; one at 0 is taken away."""
        merged = {layer: dict(some) for layer, some in self.levels.items()}
        for layer, some in levels.items():
            merged.setdefault(layer, {}).update(some)
        kept = {ly: {e: x for e, x in sorted(some.items()) if x} for ly, some in merged.items()}
        return replace(self, levels={ly: kept[ly] for ly in sorted(kept) if kept[ly]})


def _frozen(sets: dict[int, set[int]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(sets.items()) if experts}


def install(steering: Steering, resident: Resident, taps: Taps) -> None:
    """Put `steering` into force for the next forward; experts that are not live are skipped."""
    for tap in taps.layers:
        moe = tap.experts
        up = mask(moe, steering.activate.get(moe.layer.index, ()))
        down = mask(moe, steering.deactivate.get(moe.layer.index, ()))
        added = addends(steering, moe, up, down)
        tap.logits_rule = tap.bias = None
        if not (up.any() or down.any() or added.any()):
            continue
        if moe.layer.bias_name is not None:
            own = resident.tree.get(f"{moe.layer.bias_owner}.{moe.layer.bias_name}")
            tap.bias = baked_bias(steering, moe, own, up, down)
            mx.eval(tap.bias)
            continue
        forcing = steering.rule != "additive" and (up | down).any()
        nobody = np.zeros_like(up)
        forced = (up, down) if forcing else (nobody, nobody)
        margin = GROUP_MARGIN if moe.layer.grouped else MARGIN
        tap.logits_rule = rule_of(added, *forced, margin)


def addends(steering: Steering, moe: LiveExperts, up: Mask, down: Mask) -> NDArray[np.float64]:
    """What is added to each of the router's rows as sliced, float64 [R]: faders, and what is
    switched by the additive rule.
    """
    added = np.zeros(len(up))
    for expert, level in steering.levels.get(moe.layer.index, {}).items():
        if expert in moe.live:
            added[moe.live.index(expert)] = level
    if steering.rule == "additive":
        added += np.where(up, steering.boost_value, 0.0)
        added += np.where(down, steering.mask_value, 0.0)
    return added


def baked_bias(
    steering: Steering, moe: LiveExperts, own: mx.array, up: Mask, down: Mask
) -> mx.array:
    """The selection bias [R], float32, that does what `steering` asks."""
    added = addends(steering, moe, up, down)
    forcing = steering.rule != "additive" and (up | down).any()
    if added.any() or not forcing:
        own = raised_above_fill(moe.layer, own) + mx.array(added, mx.float32)
    return steered_bias(moe.layer, own, up, down) if forcing else own


def mask(moe: LiveExperts, experts: tuple[int, ...]) -> Mask:
    """bool [R] over the router's rows as sliced; rows beyond the experts are never steered."""
    rows = moe.layer.router_rows - moe.layer.num_experts + len(moe.live)
    mask = np.zeros(rows, dtype=np.bool_)
    mask[[moe.live.index(e) for e in experts if e in moe.live]] = True
    return mask


def logits_rule(up: Mask, down: Mask, margin: float) -> LogitsRule:
    """SteerMoE's rule as a function of logits [..., R]; dtype kept."""
    return rule_of(np.zeros(len(up)), up, down, margin)


def rule_of(added: NDArray[np.float64], up: Mask, down: Mask, margin: float) -> LogitsRule:
    """Logits [..., R] with `added` [R], then forced by SteerMoE's rule; dtype kept."""
    wanted = _Wanted(bool(added.any()), bool(up.any()), bool(down.any()), margin)
    given = [
        mx.array(values)
        for values, asked in ((added.astype(np.float32), wanted.adds), (up, wanted.raises),
                              (down, wanted.lowers))
        if asked
    ]  # fmt: skip
    mx.eval(given)
    rule = _rule(wanted, mx.default_device() == mx.Device(mx.gpu))
    return lambda logits: rule(logits, *given)


class _Wanted(NamedTuple):
    """The parts of a rule."""

    adds: bool
    raises: bool
    lowers: bool
    margin: float


@cache
def _rule(wanted: _Wanted, fused: bool) -> Callable[..., mx.array]:
    """(logits [..., R], then the arrays [R] of each part) -> steered logits.

    Decoding on a GPU is bound by launches: fused, a rule is one kernel and one more for each
    extreme that it looks for, instead of twelve. Every layer shares the few that there are, so
    that a change of steering in the middle of an answer compiles nothing.
    """

    def rule(logits: mx.array, *given: mx.array) -> mx.array:
        parts = iter(given)
        if wanted.adds:
            logits = _added(logits, next(parts))
        steered = logits.astype(mx.float32)
        if wanted.raises:
            top = mx.max(logits, axis=-1, keepdims=True).astype(mx.float32)
            above = top + _margin_at(top, logits.dtype, wanted.margin)
            steered = mx.where(next(parts), above, steered)
        if wanted.lowers:
            low = mx.min(logits, axis=-1, keepdims=True).astype(mx.float32)
            below = low - _margin_at(low, logits.dtype, wanted.margin)
            steered = mx.where(next(parts), below, steered)
        return steered.astype(logits.dtype)

    return mx.compile(rule, shapeless=True) if fused else rule


def _added(logits: mx.array, values: mx.array) -> mx.array:
    """In float32; never beyond the range of the logits' dtype."""
    limits = mx.finfo(logits.dtype)
    return mx.clip(logits.astype(mx.float32) + values, limits.min, limits.max).astype(logits.dtype)


def _margin_at(extreme: mx.array, dtype: mx.Dtype, margin: float) -> mx.array:
    # In bfloat16 the next number above 10 is 0.06 away: 0.01 alone would round to a tie.
    return mx.maximum(margin, 2 * mx.finfo(dtype).eps * mx.abs(extreme))


def steered_bias(layer: MoELayer, bias: mx.array, up: Mask, down: Mask) -> mx.array:
    """The selection bias [R], float32, that selects `up` and never `down`.

    Float32 even for a 16-bit bias: it enters the selection only, and shifting a bfloat16 bias
    would round away the differences between live experts.
    """
    wide = mx.where(mx.array(up), FORCED, raised_above_fill(layer, bias))
    return mx.where(mx.array(down), -FORCED, wide)


def raised_above_fill(layer: MoELayer, bias: mx.array) -> mx.array:
    """The bias [R], float32, shifted so that every live score beats what losing groups are filled
    with; a common shift changes no choice between live experts."""
    wide = bias.astype(mx.float32)
    if layer.grouped and layer.facts.group_fill == 0.0:
        # What was baked as "never" stays there: shifting by as much would round all others away.
        living = mx.where(wide > -FORCED / 2, wide, 0.0)
        wide = wide + (1.0 + mx.maximum(0.0, -mx.min(living)))
    return wide
