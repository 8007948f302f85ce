"""What few tokens were routed to is taken out of a file; the figures of a difference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxfun.calibration import combine
from mlxfun.calibration.files import diff_files, merge_files
from mlxfun.calibration.filters import figures, purge_file
from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.errors import PlanError, UsageError

LAYERS = (1, 3)


def run(seed: int = 0) -> RoutingStats:
    update = np.random.default_rng(seed).uniform(1, 9, (2, len(SUMS), 12))
    update[:, 0] = np.arange(24).reshape(2, 12)  # tokens of each expert
    return RoutingStats.empty(LAYERS, 12, model="m", state="s").plus(update, 3, 40)


def saved(tmp_path: Path, name: str, stats: RoutingStats) -> Path:
    stats.save(tmp_path / name)
    return tmp_path / name


def test_experts_of_few_tokens_score_nothing_and_the_others_as_before(tmp_path: Path) -> None:
    source = saved(tmp_path, "a.npz", run())
    report = purge_file(source, tmp_path / "b.npz", min_freq=5, min_count=3)
    assert (report.experts, report.by_freq, report.by_count) == (24, 5, 3)
    assert (report.purged, report.kept) == (5, 19)
    before, after = RoutingStats.read(source), RoutingStats.read(tmp_path / "b.npz")
    gone = before.sums["freq"] < 5
    for metric in METRICS:
        assert not after.score(metric)[gone].any()
        assert np.array_equal(after.score(metric)[~gone], before.score(metric)[~gone])
    assert (after.state, after.tokens) == (before.state, before.tokens)


def test_a_count_of_measured_norms_of_its_own_is_what_min_count_looks_at(tmp_path: Path) -> None:
    """Servers of the family count tokens whose norms they do not measure."""
    freq = np.full((2, 12), 50.0)
    measured = np.where(np.arange(24).reshape(2, 12) < 4, 0.0, 50.0)
    np.savez(tmp_path / "a.npz", freq=freq, reap_sum=freq, ean_sum=freq, reap_count=measured)
    report = purge_file(tmp_path / "a.npz", tmp_path / "b.npz", min_freq=10, min_count=10)
    assert (report.by_freq, report.by_count, report.purged) == (0, 4, 4)


def test_large_norms_are_warned_of_and_kept(tmp_path: Path) -> None:
    source = saved(tmp_path, "a.npz", run())
    stats = RoutingStats.read(source)
    freq = stats.sums["freq"]
    mean = np.divide(stats.sums["ean_sum"], freq, out=np.zeros_like(freq), where=freq > 0)
    report = purge_file(source, tmp_path / "b.npz", max_norm=1.0)
    assert report.above_norm == int((mean > 1).sum()) > 0
    assert report.purged == 0
    assert any("above 1" in notice for notice in report.notices)
    assert np.array_equal(
        RoutingStats.read(tmp_path / "b.npz").sums["ean_sum"], stats.sums["ean_sum"]
    )


def test_a_purge_needs_a_filter_and_counts_of_tokens(tmp_path: Path) -> None:
    source = saved(tmp_path, "a.npz", run())
    with pytest.raises(UsageError, match="--min-freq N, --min-count N or --max-norm X"):
        purge_file(source, tmp_path / "b.npz")
    ranks = saved(tmp_path, "r.npz", combine.ranked(run()))
    with pytest.raises(PlanError, match="holds ranks"):
        purge_file(ranks, tmp_path / "b.npz", min_freq=1)
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("metric", METRICS)
def test_the_figures_of_a_difference_are_those_of_the_scores(metric: str) -> None:
    a, b = run(1), run(2)
    expected = a.score(metric) - b.score(metric)
    found = figures(a, b, metric)
    assert found.mean == pytest.approx(expected.mean())
    assert found.std == pytest.approx(expected.std())
    assert (found.min, found.max) == (expected.min(), expected.max())
    assert found.positive + found.negative + found.zero == 24
    assert found.positive == (expected > 0).sum()
    ordered = sorted((float(x) for x in expected.ravel() if x > 0), reverse=True)[:10]
    assert [one.difference for one in found.higher] == ordered
    assert [one.difference for one in found.lower] == sorted(
        float(x) for x in expected.ravel() if x < 0
    )[:10]
    for one in (*found.higher, *found.lower):
        assert LAYERS[one.position] == one.layer
        assert expected[one.position, one.expert] == one.difference


def test_the_json_of_a_difference_has_the_names_that_others_read(tmp_path: Path) -> None:
    a, b = saved(tmp_path, "a.npz", run(1)), saved(tmp_path, "b.npz", run(2))
    diff_files(a, b, tmp_path / "d.json", metric="ean")
    found = json.loads((tmp_path / "d.json").read_text())
    expected = run(1).score("ean") - run(2).score("ean")
    assert found["metric"] == "ean"
    assert found["diff_mean"] == pytest.approx(expected.mean())
    assert found["diff_abs_max"] == pytest.approx(np.abs(expected).max())
    assert found["positive_count"] + found["negative_count"] + found["zero_count"] == 24
    first = found["top_positive"][0]
    assert (
        expected[first["layer_idx"], first["expert_idx"]] == first["diff_value"] == expected.max()
    )
    assert {"share_difference", "rank_correlation"} <= set(found)


@pytest.mark.parametrize("metric", METRICS)
def test_a_merge_by_ranks_of_one_metric_ranks_so_under_every_name(
    tmp_path: Path, metric: str
) -> None:
    files = tuple(saved(tmp_path, f"{seed}.npz", run(seed)) for seed in (1, 2))
    merge_files(files, tmp_path / "m.npz", "rank", metric=metric)
    merged = RoutingStats.read(tmp_path / "m.npz")
    expected = sum(combine.rank_scores(run(seed).score(metric)) for seed in (1, 2))
    for name in METRICS:
        assert np.array_equal(merged.score(name), expected)


def test_a_sum_takes_no_metric(tmp_path: Path) -> None:
    files = tuple(saved(tmp_path, f"{seed}.npz", run(seed)) for seed in (1, 2))
    with pytest.raises(UsageError, match="--metric reap goes with --by rank"):
        merge_files(files, tmp_path / "m.npz", "sum", metric="reap")
