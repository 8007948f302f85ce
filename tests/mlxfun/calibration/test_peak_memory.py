"""Reading routing, samples and directions needs little more memory than the plain forward does."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from rigs import make_rig

from mlxfun.calibration import collect
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.data.datasets import batches
from mlxfun.scans.sample_routing import Sample, scan
from mlxfun.techniques.ablate.directions import residual_means

SEQUENCES = [np.random.default_rng(i).integers(0, 64, 256).astype(np.int32) for i in range(4)]


@pytest.fixture(scope="module")
def deep():
    model, config = tiny_models.build(
        "qwen3_moe", num_hidden_layers=24, hidden_size=128, num_experts=16,
        num_experts_per_tok=4, moe_intermediate_size=64,
    )  # fmt: skip
    return make_rig(model, config)


def peak(work: Callable[[], object]) -> int:
    """Bytes above what was there before, at most."""
    work()  # what is made once
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


@pytest.fixture(scope="module")
def plain(deep) -> int:
    """The plain forward's peak."""
    (batch,) = batches(SEQUENCES, 2048, 4)
    deep.taps.detach()
    try:
        return peak(lambda: mx.eval(deep.model.model(mx.array(batch.tokens))))
    finally:
        deep.taps.attach()


def test_collect(deep, plain: int) -> None:
    start = RoutingStats.empty(deep.anatomy.indices, 16)
    todo = batches(SEQUENCES, 2048, 4)
    used = peak(lambda: collect.collect(deep.model, deep.taps, todo, start))
    assert used <= 1.3 * plain


def test_scan(deep, plain: int) -> None:
    samples = [Sample(sequence) for sequence in SEQUENCES]
    assert peak(lambda: scan(deep.model, deep.taps, samples)) <= 1.3 * plain


def test_directions(deep, plain: int) -> None:
    modules = deep.resident.tree.modules
    layers = [modules[layer.path] for layer in deep.map.layers]
    todo = batches(SEQUENCES, 2048, 4)
    used = peak(lambda: residual_means(deep.model, deep.anatomy, layers, todo))
    assert used <= 1.3 * plain
