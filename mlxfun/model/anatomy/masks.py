"""Expert sets as boolean masks [L, E]."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxfun.arrays import Array
from mlxfun.model.anatomy import MoEMap


def mask_of(anatomy: MoEMap, live: tuple[tuple[int, ...], ...]) -> Array:
    """bool [L, E], True where an expert is among `live`."""
    mask = np.zeros((len(anatomy.layers), anatomy.num_experts), dtype=np.bool_)
    for row, experts in enumerate(live):
        mask[row, list(experts)] = True
    return mask


def sets_mask(anatomy: MoEMap, sets: Any) -> Array:
    """bool [L, E] of {decoder layer: experts}."""
    mask = np.zeros((len(anatomy.layers), anatomy.num_experts), dtype=np.bool_)
    for layer, experts in sets.items():
        position = anatomy.position_of(layer)
        if position is not None:
            mask[position, list(experts)] = True
    return mask
