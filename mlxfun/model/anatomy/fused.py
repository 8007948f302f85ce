"""Which outputs of a fused projection are queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import mlx.nn as nn
import numpy as np

from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.model.anatomy.names import columns_of

Role = Literal["q", "k", "v"]


def fused_columns(
    modules: Mapping[str, nn.Module], attention: str, fused: str, output: str
) -> dict[Role, tuple[int, ...]]:
    """{q, k, v: columns of what the module at `fused` puts out}, in the order of heads.

    attention, fused, output: paths of an attention and of its projections. Empty for a layout that
    is not known. Most lay queries, keys and values one after the other; some (facts.FUSED_LAYOUT)
    keep those of one key-value head together.
    """
    layout = facts.FUSED_LAYOUT.get(module_name(modules[attention]), "one after the other")
    weight = modules[fused].get("weight")
    if layout == "unknown" or weight is None or "weight" not in modules[output]:
        return {}
    total, queries = int(weight.shape[0]), columns_of(modules[output])
    if queries >= total or (total - queries) % 2:
        return {}
    keys = (total - queries) // 2
    every = np.arange(total)
    if layout == "one after the other":
        parts = every[:queries], every[queries : queries + keys], every[queries + keys :]
    else:
        held = vars(modules[attention])
        heads = next((int(held[name]) for name in facts.HEAD_COUNTS if name in held), 0)
        if not heads or queries % heads:
            return {}
        width = queries // heads
        groups = keys // width
        grid = every.reshape(groups, heads // groups + 2, width)
        parts = grid[:, :-2].reshape(-1), grid[:, -2].reshape(-1), grid[:, -1].reshape(-1)
    roles: tuple[Role, ...] = ("q", "k", "v")
    return {role: tuple(part.tolist()) for role, part in zip(roles, parts, strict=True)}
