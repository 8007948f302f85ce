"""Options of choosing bits."""

from __future__ import annotations

from dataclasses import dataclass

from mlxfun.data.options import DatasetOptions

UNPACKED = 16
"""The choice that leaves a module as it is."""

CHOICES = (2, 3, 4, 6, 8, UNPACKED)

GROUP_SIZE = 64
"""Values that share a scale, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class BitsOptions:
    """to_bytes: what the weights of the saved model may take. choices: bits that a module may have;
    UNPACKED leaves it as it is. group_size: values that share a scale. seed: of the labels that
    sensitivities are sampled with. data: the text they are measured on, None for that of the last
    collect."""

    to_bytes: int
    choices: tuple[int, ...] = CHOICES
    group_size: int = GROUP_SIZE
    seed: int = 0
    data: DatasetOptions | None = None
