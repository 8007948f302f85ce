"""Shared by the tests of merging: a merger on a tiny model, and a slow twin of the whole method."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from rigs import Rig, keep_fewer

from mlxfun.context import SILENT
from mlxfun.data.datasets import batches
from mlxfun.data.options import DatasetOptions
from mlxfun.techniques.merge.delta import Merger
from mlxfun.techniques.merge.options import MergeOptions

SEQUENCES = [
    np.array([(7 * i + i * i) % 61 for i in range(40)], np.int32),
    np.array([3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46], np.int32),
    np.array([1, 60, 2, 50, 33, 12], np.int32),
]


def merge_options(**changes) -> MergeOptions:
    return MergeOptions(DatasetOptions("none"), **changes)


def run_merge(
    rig: Rig, keep=None, *, sequences=SEQUENCES, ctx=SILENT, by_error=None, moved=None, **changes
):
    """(plan, delta) of merging to `keep` (by default 6 of 8 experts), the model unchanged."""
    keep = keep or keep_fewer(rig.anatomy)
    merger = Merger(rig, merge_options(**changes), moved=moved)
    wanted = lambda p, _: keep[rig.anatomy.indices[p]]  # noqa: E731
    return merger.run(batches(sequences, 64, 2), wanted, ctx, by_error)


def parameters(rig: Rig) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    return {
        p: np.array(a) for p, a in tree_flatten(rig.model.parameters()) if a.dtype != mx.bfloat16
    }


def permute_expert(bank, source, target, order):
    """Make expert `target` a copy of `source` with its neurons in another order."""
    index = mx.array(order)
    for name in bank.names:
        module = bank.projection(name)
        weight = module.weight
        inward = name in bank.inward
        weight[target] = weight[source][index] if inward else weight[source][:, index]
        module.weight = weight
        if "bias" in module:
            bias = module.bias
            bias[target] = bias[source][index] if inward else bias[source]
            module.bias = bias
    mx.eval(bank.experts.parameters())
