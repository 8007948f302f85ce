"""What fits how: the whole model, some of its experts, or one layer after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.memory.plan.parts import Parts
from mlxfun.memory.plan.report import Fit, FitReport, Level
from mlxfun.memory.slots.shares import divided, served

if TYPE_CHECKING:
    from mlxfun.arrays import Array

SHARE = 0.8
"""Of the memory, what a model that is not whole in it is given, as `load --resident auto` does."""

LEVELS = (0.25, 0.5, 0.75)
"""Shares of the experts that prunes are priced for."""

STREAM_TOKENS = 16_384
STREAM_FACTOR = 1.3
"""A pass over a text of so many tokens, layer by layer: its peak is at most this times the largest
layer and the hidden states."""


@dataclass(frozen=True, slots=True)
class Machine:
    """memory: bytes the model may take; bandwidth: bytes a second of the disk, None for unknown."""

    memory: int
    bandwidth: float | None = None


def hit_rate(parts: Parts, slots: Sequence[int], used: Array | None) -> float:
    """The share of choices that find their expert in one of the slots of each layer.

    used: float64 [L, E], how often each expert was chosen; each layer then holds its most used. None:
    as if all were used alike, which is the least that can be expected.
    """
    if used is None:
        used = np.zeros((len(slots), parts.experts))
    return served(list(used), slots) if slots else 0.0


def slots_of(parts: Parts, capacity: int, used: Array | None) -> tuple[int, ...]:
    """Slots of each layer, as `load --resident` divides them by recorded use."""
    even = (capacity,) * len(parts.expert_bytes)
    if used is None or not 0 < capacity < parts.experts:
        return even
    return divided(list(used), list(parts.expert_bytes.values()), even, parts.top_k)


def fit(name: str, parts: Parts, machine: Machine, used: Array | None = None) -> FitReport:
    """The report on a model, see FitReport."""
    capacity = _slots(parts, machine.memory)
    slots = slots_of(parts, capacity, used)
    return FitReport(
        model=name,
        memory=machine.memory,
        bandwidth=machine.bandwidth,
        parts={part: size for part, size in parts.bytes.items() if size},
        whole=parts.whole,
        kept=parts.kept,
        layers=len(parts.expert_bytes),
        experts=parts.experts,
        top_k=parts.top_k,
        expert_bytes=parts.one_each,
        active=parts.active,
        fit=_how(parts, machine.memory, capacity),
        capacity=capacity,
        slots=slots,
        held=parts.kept + capacity * parts.one_each,
        hit_rate=hit_rate(parts, slots, used) if capacity else None,
        measured_use=used is not None,
        tokens_per_second=_speed(parts, machine, slots, used),
        streamed=_streamed(parts),
        levels=tuple(_levels(parts, machine.memory)),
    )


def _slots(parts: Parts, memory: int) -> int:
    """Experts a layer that fit; all where the model fits whole, 0 where too few do."""
    if parts.whole <= memory:
        return parts.experts
    if not parts.one_each:
        return 0
    slots = int((memory * SHARE - parts.kept) // parts.one_each)
    return min(slots, parts.experts - 1) if slots >= max(parts.top_k, 1) else 0


def _how(parts: Parts, memory: int, slots: int) -> Fit:
    if parts.whole <= memory:
        return "whole"
    if slots:
        return "partly"
    return "streamed" if _streamed(parts) <= memory else "no"


def _streamed(parts: Parts) -> int:
    hidden = STREAM_TOKENS * parts.hidden * 2
    return int(STREAM_FACTOR * (parts.largest_layer + hidden)) + parts.bytes["embeddings"]


def _speed(
    parts: Parts, machine: Machine, slots: Sequence[int], used: Array | None
) -> float | None:
    """The most tokens a second that the disk allows; None where nothing is read, or it is unknown."""
    if not machine.bandwidth or not slots or not 0 < min(slots) < parts.experts:
        return None
    missed = (1 - hit_rate(parts, slots, used)) * parts.top_k * parts.one_each
    return machine.bandwidth / missed if missed > 0 else None


def _levels(parts: Parts, memory: int) -> list[Level]:
    if not parts.experts:
        return []
    levels = []
    for share in LEVELS:
        gone = round(parts.experts * share)
        size = parts.pruned(gone)
        levels.append(Level(share, parts.experts - gone, size, size <= memory))
    return levels
