"""REAP's router weight is the one that the model applies: renormalised over the top-k where the router
does so, which `help calibration` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from rigs import Rig

from commands.guides.index import source
from mlxfun.calibration import collect as calibrate
from mlxfun.calibration.collect import layer_sums
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.data.datasets import batches

TOKENS = np.array([(3 * i + i * i) % 61 for i in range(40)], dtype=np.int32)


@pytest.mark.parametrize("normalised", [True, False])
def test_reap_is_the_mean_of_applied_weight_times_norm(
    rig: Callable[..., Rig], normalised: bool
) -> None:
    r = rig("qwen3_moe", norm_topk_prob=normalised)
    start = RoutingStats.empty(r.anatomy.indices, r.anatomy.num_experts)
    stats, _ = calibrate.collect(r.model, r.taps, batches([TOKENS], 64, 1), start)
    with r.taps.recording(logits=True) as recording:
        mx.eval(r.model(mx.array(TOKENS[None])))
        records = recording.drain()
    for row, (record,) in enumerate(records):
        assert record.logits is not None
        assert record.norms is not None
        logits = np.array(record.logits.astype(mx.float32))[0].astype(np.float64)
        index, norms = np.array(record.indices)[0], np.array(record.norms)[0]
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        weights = np.take_along_axis(chances, index.astype(int), axis=1)
        if normalised:
            weights /= weights.sum(axis=1, keepdims=True)
        for expert in range(r.anatomy.num_experts):
            own = index == expert
            expected = (weights * norms)[own].mean() if own.any() else 0.0
            assert stats.score("reap")[row, expert] == pytest.approx(expected, rel=1e-3)
            mean = norms[own].mean() if own.any() else 0.0
            assert stats.score("man")[row, expert] == pytest.approx(mean, rel=1e-3)
            squared = (norms[own].astype(np.float64) ** 2).mean() if own.any() else 0.0
            assert stats.score("msan")[row, expert] == pytest.approx(squared, rel=1e-3)
    applied = stats.score("weighted_freq").sum(axis=1)
    assert np.allclose(applied, len(TOKENS)) == normalised


def test_help_names_it() -> None:
    text = source("calibration")
    assert "REAP with renormalised weights" in text
    assert "norm_topk_prob" in text


def test_where_no_weight_was_seen_none_is_made_up(rig: Callable[..., Rig]) -> None:
    """An expert would count as if it had been applied whole."""
    r = rig("qwen3_moe")
    with r.taps.recording() as recording:
        r.logits([[3, 14, 15, 9]])
        records = recording.drain()[0]
    mask, layer = mx.ones(4), r.anatomy.layers[0]
    weighted = np.array(layer_sums(layer, records, mask))[SUMS.index("weighted_freq_sum")]
    assert weighted.sum() == pytest.approx(4, rel=1e-5)  # of four tokens, each the weights' sum
    unseen = [replace(record, weights=None) for record in records]
    with pytest.raises(RuntimeError, match="did not show its routing weights"):
        layer_sums(layer, unseen, mask)
