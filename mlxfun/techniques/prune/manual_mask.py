"""Boolean masks of manually selected experts: pure arithmetic, fast enough for every key press.

Masks and scores are [L, E] in checkpoint numbering; `gone` marks what goes. A selection can be
*runnable* (every token finds its top-k experts, and a grouped router its groups) without being
*even*: it can be staged, talked to and measured then, but stock loading holds one expert count for
all layers, so only an even one can be applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxfun.data.expert_notation import spell
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, UsageError
from mlxfun.techniques.prune.options import SelectOptions
from mlxfun.text import counted

if TYPE_CHECKING:
    from mlxfun.arrays import Array

NAMED = 3
"""How many layers a sentence names before it only counts them."""


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """What a selection picks from. layers: decoder index of each row.

    alive, protected: bool [L, E]. scores: float64 [L, E], None before anything is measured.
    top_k, groups and open_groups: per layer, experts a token uses, groups of the router (1: none)
    and how many of them a token uses.
    """

    layers: tuple[int, ...]
    alive: Array
    protected: Array
    scores: Array | None
    top_k: tuple[int, ...]
    groups: tuple[int, ...]
    open_groups: tuple[int, ...]

    @property
    def step(self) -> int:
        """The count that goes from a layer is a multiple of this."""
        return math.lcm(*self.groups)

    def parts(self, row: int) -> list[range]:
        """Expert ranges of the groups of one layer."""
        size = self.alive.shape[1] // self.groups[row]
        return [range(g * size, (g + 1) * size) for g in range(self.groups[row])]

    def most(self) -> int:
        """How many experts can go from every layer at once."""
        found = []
        for row in range(len(self.layers)):
            counts = [int(self.alive[row, p.start : p.stop].sum()) for p in self.parts(row)]
            needed = self._needed(row)
            found.append(min(count - needed for count in counts) * len(counts))
        return max(0, min(found)) // self.step * self.step

    def _needed(self, row: int) -> int:
        """Experts that each group of a layer must keep."""
        if self.groups[row] == 1:
            return self.top_k[row]
        # A group is scored by the sum of its two best experts, so it needs two.
        return max(2, -(-self.top_k[row] // self.open_groups[row]))

    def unrunnable(self, gone: Array) -> str:
        """Why the model could not run without `gone`, naming a layer; "" when it could."""
        for row, layer in enumerate(self.layers):
            left = [int((self.alive & ~gone)[row, p.start : p.stop].sum()) for p in self.parts(row)]
            if len(left) == 1 and left[0] < self.top_k[row]:
                return (
                    f"layer {layer} would keep {counted(left[0], 'expert', 'experts')}, and every token uses "
                    f"{self.top_k[row]}"
                )
            if len(left) > 1 and (len(set(left)) > 1 or left[0] < self._needed(row)):
                return (
                    f"layer {layer} would keep {', '.join(map(str, left))} experts in its "
                    f"{len(left)} groups; each must keep the same number, at least "
                    f"{self._needed(row)}"
                )
        return ""


def counts(gone: Array) -> tuple[int, ...]:
    """How many experts each layer loses."""
    return tuple(int(n) for n in gone.sum(axis=1))


def unevenness(layers: Sequence[int], lost: Sequence[int]) -> str:
    """Which layers lose more than the others, in words; "" when all lose the same number.

    >>> unevenness((0, 1, 2), (3, 2, 2))
    'layer 0 loses 3 experts, the others 2'
    >>> unevenness((0, 1, 2), (2, 2, 2))
    ''
    """
    numbers = sorted(set(lost))
    if len(numbers) < 2:
        return ""
    usual = max(numbers, key=lambda n: (sum(m == n for m in lost), -n))
    odd = [(layer, n) for layer, n in zip(layers, lost, strict=True) if n != usual]
    said = {0: "none", 1: "1 expert"}
    named = "; ".join(f"layer {ly} loses {said.get(n, f'{n} experts')}" for ly, n in odd[:NAMED])
    more = f"; {len(odd) - NAMED} more differ" if len(odd) > NAMED else ""
    return f"{named}{more}, the others {usual}"


def require_even(plan: PlanReport) -> None:
    """Raise PlanError when a plan made by hand cannot be applied yet."""
    if plan.strategy != "hand":
        return
    said = unevenness(tuple(plan.pruned), [len(e) for e in plan.pruned.values()])
    if said:
        raise PlanError(
            f"not applied: {said}, and stock loading holds one number for all layers; "
            "`select --even` evens it out by score, or pick the rest by hand"
        )


def lost(field: Field, gone: Array) -> Array | None:
    """Share of each layer's score that goes, float64 [L]; None before anything is measured."""
    if field.scores is None:
        return None
    living = np.where(field.alive, field.scores, 0.0)
    total = living.sum(axis=1)
    share: Array = np.divide(
        np.where(gone, living, 0.0).sum(axis=1), total, out=np.zeros(len(total)), where=total > 0
    )
    return share


def saved(expert_bytes: Sequence[int], gone: Array) -> int:
    """Bytes that go with `gone`; expert_bytes: of one expert of each layer."""
    return sum(n * size for n, size in zip(counts(gone), expert_bytes, strict=True))


def evened(field: Field, gone: Array, count: int | None = None) -> Array:
    """`gone` with `count` experts going from every layer, or as many as from the one losing most.

    What is missing is taken from the lowest scores, what is too much spared from the highest;
    protected experts are never added. Raises UsageError without scores and PlanError, with the
    largest possible count, where it cannot be done.
    """
    if field.scores is None:
        raise UsageError("nothing is measured yet, so there are no scores: run collect")
    if count is None:
        count = max(
            int(gone[row, p.start : p.stop].sum()) * field.groups[row]
            for row in range(len(field.layers))
            for p in field.parts(row)
        )
        count = -(-count // field.step) * field.step
    if not 0 <= count <= field.most() or count % field.step:
        multiple = f", in steps of {field.step}" if field.step > 1 else ""
        raise PlanError(
            f"{count} experts per layer cannot be pruned; at most {field.most()} can{multiple}"
        )
    out = gone.copy()
    for row in range(len(field.layers)):
        for part in field.parts(row):
            _level(field, out[row], row, part, count // field.groups[row])
    return out


def _level(field: Field, gone: Array, row: int, part: range, count: int) -> None:
    """Bring one group of one layer (a row of the mask, changed in place) to `count`."""
    assert field.scores is not None
    score = field.scores[row]
    going = [e for e in part if gone[e]]
    # Equal scores: the higher number goes first, as everywhere (see mlxfun.techniques.prune.selection).
    for expert in sorted(going, key=lambda e: (-score[e], e))[: max(0, len(going) - count)]:
        gone[expert] = False
    free = [e for e in part if field.alive[row, e] and not gone[e] and not field.protected[row, e]]
    missing = count - len(going)
    if missing > len(free):
        raise PlanError(
            f"layer {field.layers[row]} has only {len(free)} unprotected experts left to take; "
            f"{missing} are needed to prune {count}"
        )
    for expert in sorted(free, key=lambda e: (score[e], -e))[: max(0, missing)]:
        gone[expert] = True


def below(field: Field, gone: Array, share: float) -> Array:
    """`gone` and every unprotected expert whose share of its layer's score is below `share`.

    Raises UsageError without scores.
    """
    if field.scores is None:
        raise UsageError("nothing is measured yet, so there are no scores: run collect")
    living = np.where(field.alive, field.scores, 0.0)
    total = living.sum(axis=1, keepdims=True)
    shares = np.divide(living, total, out=np.zeros_like(living), where=total > 0)
    result: Array = gone | ((shares < share) & field.alive & ~field.protected)
    return result


def picked(field: Field, start: Array, options: SelectOptions) -> Array:
    """The selection after a change of `start`.

    Raises UsageError or PlanError for experts that do not exist, are gone already, or are both to
    go and to stay.
    """
    gone = np.zeros_like(start) if options.clear else start.copy()
    drop, keep = (mask_of(field, sets) for sets in (options.drop, options.keep))
    if (drop & keep).any():
        names = spell(sets_of(field.layers, drop & keep))
        raise UsageError(
            f"{names} cannot be both pruned and kept: name each in --drop or in --keep"
        )
    gone = (gone | drop) & ~keep
    if options.below is not None:
        gone = below(field, gone, options.below) & ~keep
    if options.n_prune is not None:
        gone = evened(field, gone, options.n_prune)
    elif options.even:
        gone = evened(field, gone)
    return gone


def mask_of(field: Field, sets: Mapping[int, Sequence[int]]) -> Array:
    """bool [L, E] of {decoder layer: experts}, all of which must be alive."""
    mask = np.zeros_like(field.alive)
    experts = mask.shape[1]
    for layer, chosen in sets.items():
        if layer not in field.layers:
            raise PlanError(
                f"decoder layer {layer} is not an MoE layer; they are "
                f"{field.layers[0]}..{field.layers[-1]}"
            )
        row = field.layers.index(layer)
        for expert in chosen:
            if expert >= experts:
                raise PlanError(f"layer {layer} has no expert {expert}; they are 0..{experts - 1}")
            if not field.alive[row, expert]:
                raise PlanError(f"expert {expert} of layer {layer} is pruned already")
            mask[row, expert] = True
    return mask


def sets_of(layers: Sequence[int], mask: Array) -> dict[int, tuple[int, ...]]:
    """{decoder layer: experts} of a mask, layers without any left out."""
    return {
        layer: tuple(int(e) for e in np.flatnonzero(mask[row]))
        for row, layer in enumerate(layers)
        if mask[row].any()
    }


def change_line(layers: Sequence[int], before: Array, after: Array) -> str:
    """The command line that makes the selection `after` out of `before`; "" when they agree."""
    words: list[Any] = []
    for option, mask in (("--drop", after & ~before), ("--keep", before & ~after)):
        if mask.any():
            words += [option, spell(sets_of(layers, mask))]
    return " ".join(["select", *words]) if words else ""
