"""Steering and observing at once: what is counted is what ran, and nothing asked is nothing done."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun.calibration import collect
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.data.datasets import batches
from mlxfun.steering import rules as steer
from mlxfun.steering.checks import check
from mlxfun.steering.rules import Steering

SEQUENCES = [np.arange(1, n, dtype=np.int32) % 61 for n in (9, 25, 14)]
TOKENS = sum(len(s) for s in SEQUENCES)


def install(r, steering: Steering) -> None:
    checked, _ = check(steering, r.resident)
    steer.install(checked, r.resident, r.taps)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe", "gemma4_text", "gpt_oss"])
def test_statistics_count_the_steered_routing_and_are_not_zero(rig, name):
    r = rig(name)
    up = {layer.index: (5,) for layer in r.anatomy.layers}
    down = {layer.index: (1, 4) for layer in r.anatomy.layers}
    install(r, Steering(up, down))
    start = RoutingStats.empty(r.anatomy.indices, r.anatomy.num_experts)
    stats, _ = collect.collect(r.model, r.taps, batches(SEQUENCES, 64, 4), start)
    freq = stats.sums["freq"]
    assert (freq[:, 5] == TOKENS).all()
    assert (freq[:, [1, 4]] == 0).all()
    assert freq.sum(axis=1).tolist() == [TOKENS * layer.top_k for layer in r.anatomy.layers]
    assert (stats.sums["reap_sum"][:, 5] > 0).all()


@pytest.mark.parametrize("name", ["qwen3_moe", *tiny_models.GROUPED])
def test_layers_named_with_no_experts_change_nothing_bit_for_bit(rig, name):
    r = rig(name)
    prompt = mx.array([list(range(1, 30))])
    before = r.model(prompt)
    nobody = {layer.index: () for layer in r.anatomy.layers}
    for steering in (Steering(), Steering(nobody, nobody)):
        install(r, steering)
        assert mx.array_equal(before, r.model(prompt)).item()
