"""Routing statistics equal a plain per-sample reference, whatever the batching."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun.calibration import collect as calibrate
from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.context import Context
from mlxfun.data.datasets import batches
from mlxfun.errors import Cancelled, DatasetError, PlanError, StateError, UsageError
from mlxfun.events import RoutingFrame
from tests.families import spread

SEQUENCES = [
    np.array([(3 * i + 7 * n + i * i) % 61 for i in range(length)], dtype=np.int32)
    for n, length in enumerate((5, 17, 9, 30, 2, 12))
]


def reference(r) -> dict[str, np.ndarray]:
    """One sequence at a time, one token at a time, one place at a time, in float64."""
    shape = (len(r.anatomy.layers), r.anatomy.num_experts)
    sums = {name: np.zeros(shape) for name in SUMS}
    for sequence in SEQUENCES:
        with r.taps.recording() as recording:
            mx.eval(r.model(mx.array(sequence[None])))
            records = recording.drain()
        for row, layer in enumerate(r.anatomy.layers):
            record = records[row][0]
            mx.eval(record.arrays())
            k = layer.top_k
            index = np.array(record.indices).reshape(-1, k)
            weight = np.array(record.weights.astype(mx.float32)).reshape(-1, k)
            norm = np.array(record.norms).reshape(-1, k)
            for t in range(len(sequence)):
                for place in range(k):
                    e, w, n = index[t, place], float(weight[t, place]), float(norm[t, place])
                    if layer.router_rows > layer.num_experts and w == 0:
                        continue
                    g = n if layer.facts.weights_inside else w * n
                    sums["freq"][row, e] += 1
                    sums["weighted_freq_sum"][row, e] += w
                    sums["ean_sum"][row, e] += n
                    sums["reap_sum"][row, e] += g
                    sums["reap_sq_sum"][row, e] += g * g
                    sums["ean_sq_sum"][row, e] += n * n
    return sums


def collect(r, batch_tokens: int, max_batch: int, ctx: Context | None = None):
    start = RoutingStats.empty(r.anatomy.indices, r.anatomy.num_experts)
    todo = batches(SEQUENCES, batch_tokens, max_batch)
    return calibrate.collect(r.model, r.taps, todo, start, ctx or Context())


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_statistics_equal_the_plain_reference_batched_or_one_by_one(rig, name):
    r = rig(name)
    expected = reference(r)
    for batch_tokens, max_batch in ((1, 1), (64, 4)):
        stats, cancelled = collect(r, batch_tokens, max_batch)
        assert not cancelled
        assert (stats.samples, stats.tokens) == (6, 75)
        np.testing.assert_array_equal(stats.sums["freq"], expected["freq"])
        for metric in SUMS[1:]:
            np.testing.assert_allclose(stats.sums[metric], expected[metric], rtol=2e-4, atol=1e-5)


def test_a_batch_is_awaited_once_a_layer_at_most(rig, monkeypatch):
    r = rig("qwen3_moe")
    real, calls = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *a: (calls.append(1), real(*a)))
    collect(r, 64, 4)
    assert len(calls) <= len(batches(SEQUENCES, 64, 4)) * len(r.anatomy.layers)


def test_cancelling_keeps_what_was_collected_and_frames_were_sent(rig):
    r = rig("qwen3_moe")

    class StopAfterTwo(Context):
        def __init__(self) -> None:
            self.left, self.frames = 2, []

        def check(self) -> None:
            if self.left == 0:
                raise Cancelled("cancelled")
            self.left -= 1

        def emit(self, event) -> None:
            self.frames.append(event)

    ctx = StopAfterTwo()
    stats, cancelled = collect(r, 1, 1, ctx)
    assert cancelled
    assert stats.samples == 2
    assert isinstance(ctx.frames[0], RoutingFrame)
    assert ctx.frames[0].freq.dtype == np.int64
    assert not any(tap.clients for tap in r.taps.layers), "the taps stopped recording"


def stats_by_hand() -> RoutingStats:
    update = np.zeros((2, len(SUMS), 4))
    update[0] = [
        [4, 2, 0, 1], [2.0, 0.5, 0, 1.0], [8, 3, 0, 2], [4.0, 1.0, 0, 2.0], [5, 1, 0, 4],
        [20, 5, 0, 4],
    ]  # fmt: skip
    return RoutingStats.empty((1, 3), 4, model="m", state="s").plus(update, samples=2, tokens=7)


def test_metrics_are_defined_as_documented():
    stats = stats_by_hand()
    assert stats.score("freq")[0].tolist() == [4, 2, 0, 1]
    assert stats.score("weighted_freq")[0].tolist() == [2.0, 0.5, 0, 1.0]
    assert stats.score("reap")[0].tolist() == [1.0, 0.5, 0.0, 2.0]
    assert stats.score("reap_sum")[0].tolist() == [4.0, 1.0, 0, 2.0]
    assert stats.score("ean")[0].tolist() == [8, 3, 0, 2]
    assert stats.score("reap_sq")[0].tolist() == [5, 1, 0, 4]
    assert stats.score("man")[0].tolist() == [2.0, 1.5, 0.0, 2.0]
    assert stats.score("msan")[0].tolist() == [5.0, 2.5, 0.0, 4.0]
    with pytest.raises(UsageError, match="unknown metric 'reep'; choose one of freq"):
        stats.score("reep")
    assert stats.metrics == METRICS


def test_sums_that_nobody_measured_choose_nobody():
    update = np.zeros((2, len(SUMS), 4))
    update[:, 0], update[:, 1] = 7, 3  # counts and weights, as a server without norms has them
    stats = RoutingStats.empty((1, 3), 4).plus(update, 1, 14)
    assert stats.ranking_score("weighted_freq").all()
    for metric in ("reap", "reap_sum", "ean", "man", "msan"):
        assert not stats.score(metric).any()
        with pytest.raises(
            StateError, match=r"scores 0 by .*choose one of freq, weighted_freq, or"
        ):
            stats.ranking_score(metric)


def test_coverage_names_the_experts_never_seen():
    stats = stats_by_hand()
    alive = np.ones((2, 4), dtype=bool)
    assert stats.coverage(alive) == 3 / 8
    assert stats.unseen(alive) == ((1, 2), (3, 0), (3, 1), (3, 2), (3, 3))
    assert stats.suggested_samples(alive) == 6
    alive[1] = False
    alive[0, 2] = False
    assert stats.suggested_samples(alive) is None


def test_statistics_survive_a_round_trip_and_carry_their_identity(tmp_path):
    stats = stats_by_hand()
    path = tmp_path / "deep" / "s.npz"
    stats.save(path)
    back = RoutingStats.load(path, (1, 3), 4)
    for name in SUMS:
        np.testing.assert_array_equal(back.sums[name], stats.sums[name])
    assert (back.samples, back.tokens, back.model, back.state) == (2, 7, "m", "s")
    with np.load(path) as raw:  # what other tools of the family read
        assert int(raw["num_layers"]) == 2
        assert int(raw["num_experts"]) == 4
        assert raw["reap_count"].tolist() == stats.sums["freq"].tolist()
        assert raw["layer_indices"].tolist() == [1, 3]


def test_a_file_without_the_extra_keys_loads(tmp_path):
    path = tmp_path / "old.npz"
    ones = np.ones((2, 4))
    np.savez(path, reap_sum=ones, reap_count=ones, ean_sum=ones, freq=ones,
             weighted_freq_sum=ones, num_layers=2, num_experts=4)  # fmt: skip
    stats = RoutingStats.load(path, (1, 3), 4)
    assert stats.state == ""
    assert stats.score("man").tolist() == ones.tolist()
    for metric, needed in (("reap_sq", "reap_sq_sum"), ("msan", "ean_sq_sum")):
        with pytest.raises(StateError, match=f"have no {needed}, which --metric {metric} needs"):
            stats.score(metric)
    more = stats.plus(np.ones((2, len(SUMS), 4)), 1, 7)
    assert "msan" not in more.metrics, "its sum would lack the tokens of the file"
    assert more.score("man").tolist() == ones.tolist()
    more.save(path)
    with np.load(path) as raw:
        assert "ean_sq_sum" not in raw.files


def test_a_file_of_another_shape_or_kind_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    stats_by_hand().save(path)
    with pytest.raises(PlanError, match=r"2 x 4 .* but the model has 2 x 8"):
        RoutingStats.load(path, (1, 3), 8)
    with pytest.raises(DatasetError, match=r"does not exist; give a file written by `stats save`"):
        RoutingStats.load(tmp_path / "none.npz", (1, 3), 4)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(DatasetError, match=r"not an \.npz of routing statistics"):
        RoutingStats.load(tmp_path / "bad.npz", (1, 3), 4)
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(DatasetError, match="lacks freq, reap_sum"):
        RoutingStats.load(tmp_path / "other.npz", (1, 3), 4)
