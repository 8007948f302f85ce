"""Statistics of several runs as one: nothing is counted twice, and higher stays better."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxfun import Session
from mlxfun.calibration import combine
from mlxfun.calibration.files import diff_files, merge_files, subtract_files
from mlxfun.calibration.options import MERGE_RULES, METRICS, CollectOptions
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import DatasetError, PlanError, StateError, UsageError
from mlxfun.techniques.prune.options import PruneOptions

A, B, C = Path("a.npz"), Path("b.npz"), Path("c.npz")


def run(seed: int, layers=(1, 3), experts: int = 6, **identity) -> RoutingStats:
    """A plausible run: counts, weights and norms of a few hundred tokens; expert 4 never used."""
    rng = np.random.default_rng(seed)
    freq = rng.integers(1, 200, (len(layers), experts)).astype(float)
    freq[:, 4] = 0
    g, norm = rng.uniform(0.1, 0.6, freq.shape), rng.uniform(1, 50, freq.shape)
    update = np.stack(
        [
            freq, freq * g, freq * norm, freq * g * norm, freq * (g * norm) ** 2, freq * norm**2,
        ],
        1,
    )  # fmt: skip
    identity = {"model": "m", "model_name": "M", "state": "s"} | identity
    return RoutingStats.empty(layers, experts, **identity).plus(update, seed + 10, 300)


def same(one: RoutingStats, two: RoutingStats, exact: bool = True) -> None:
    check = np.testing.assert_array_equal if exact else np.testing.assert_allclose
    assert one.sums.keys() == two.sums.keys()
    for name in one.sums:
        check(one.sums[name], two.sums[name], *(() if exact else (1e-12,)))
    assert (one.samples, one.tokens, one.sources) == (two.samples, two.tokens, two.sources)


def test_a_merge_by_sum_is_one_long_run():
    a, b = run(1), run(2)
    merged = combine.merge([(A, a), (B, b)])
    for name in SUMS:
        np.testing.assert_array_equal(merged.sums[name], a.sums[name] + b.sums[name])
    assert (merged.samples, merged.tokens, merged.sources) == (11 + 12, 600, 2)
    assert (merged.model, merged.state, merged.combined) == ("m", "s", "sum")
    mean = (a.sums["reap_sum"] + b.sums["reap_sum"])[0, 0] / (a.sums["freq"] + b.sums["freq"])[0, 0]
    assert merged.score("reap")[0, 0] == mean


@pytest.mark.parametrize("by", MERGE_RULES)
def test_a_merge_is_the_same_in_any_order_and_grouping(by):
    runs = [(A, run(1)), (B, run(2)), (C, run(3))]
    whole = combine.merge(runs, by)
    for order in permutations(runs):
        same(combine.merge(order, by), whole)
    left = combine.merge([(A, combine.merge(runs[:2], by)), runs[2]], by)
    right = combine.merge([runs[0], (B, combine.merge(runs[1:], by))], by)
    same(left, whole, exact=False)
    same(right, whole, exact=False)


def naive_rank(row: list[float], expert: int) -> float:
    if row[expert] == 0:
        return 0.0
    score = 0.0
    for other, value in enumerate(row):
        if other != expert:
            score += 1.0 if value < row[expert] else 0.5 if value == row[expert] else 0.0
    return score / len(row)


@given(st.lists(st.integers(0, 4).map(float), min_size=2, max_size=8))
def test_rank_scores_equal_a_count_by_hand(row):
    found = combine.rank_scores(np.array([row]))[0]
    assert found.tolist() == pytest.approx([naive_rank(row, e) for e in range(len(row))])


@pytest.mark.parametrize("metric", METRICS)
def test_after_a_merge_by_rank_every_metric_still_puts_the_best_expert_first(metric):
    a = run(1)
    merged = combine.merge([(A, a), (B, replace(a, samples=99))], "rank")
    np.testing.assert_array_equal(
        np.argsort(merged.score(metric), axis=1), np.argsort(a.score(metric), axis=1)
    )
    assert (merged.score(metric)[:, 4] == 0).all(), "an expert that nobody used stays at 0"
    assert (np.delete(merged.score(metric), 4, axis=1) > 0).any()


def test_in_a_merge_by_rank_a_long_run_does_not_outvote_a_short_one():
    a, b = run(1), run(2)
    loud = replace(a, sums={name: 1000 * value for name, value in a.sums.items()})
    quiet = combine.merge([(A, a), (B, b)], "rank")
    same(combine.merge([(A, loud), (B, b)], "rank"), quiet)


def test_ranks_survive_a_file_and_other_tools_find_the_right_mean_in_it(tmp_path):
    merged = combine.merge([(A, run(1)), (B, run(2))], "rank")
    merged.save(tmp_path / "r.npz")
    back = RoutingStats.load(tmp_path / "r.npz", (1, 3), 6)
    same(back, merged)
    assert back.combined == "rank"
    with np.load(tmp_path / "r.npz") as raw:
        used = raw["reap_count"] > 0
        quotient = raw["reap_sum"][used] / raw["reap_count"][used]
    np.testing.assert_allclose(quotient, merged.score("reap")[used])


def test_ranks_and_sums_are_not_mixed():
    ranks = combine.merge([(A, run(1)), (B, run(2))], "rank")
    with pytest.raises(PlanError, match=r"a\.npz holds ranks, which cannot be summed"):
        combine.merge([(A, ranks), (B, run(3))], "sum")
    with pytest.raises(PlanError, match=r"a\.npz holds ranks, from which nothing can be taken"):
        combine.subtract((A, ranks), (B, run(3)))


def test_purging_gives_back_what_was_there_before_the_merge():
    a, b = run(1), run(2)
    merged = combine.merge([(A, a), (B, b)])
    left = combine.subtract((C, merged), (B, b))
    for name in SUMS:
        np.testing.assert_allclose(left.sums[name], a.sums[name], rtol=1e-9)
    assert (left.samples, left.tokens) == (a.samples, a.tokens)
    nothing = combine.subtract((A, a), (A, a))
    assert all((nothing.sums[name] == 0).all() for name in SUMS)


def test_purging_what_is_no_part_of_it_is_refused_with_the_figures():
    a, b = run(1), run(2)
    with pytest.raises(
        PlanError, match=r"b\.npz is no part of a\.npz: .* expert \d would be .* < 0"
    ):
        combine.subtract((A, a), (B, b))
    more = replace(a, samples=a.samples + 1)
    with pytest.raises(PlanError, match="has 12 samples, of 11"):
        combine.subtract((A, a), (B, more))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"state": "t"}, r"a\.npz was made on state s, b\.npz on state t; .*--allow-stale"),
        ({"model": "n", "model_name": "N"}, r"on the model M, b\.npz on the model N;"),
    ],
)
def test_runs_of_different_weights_are_refused_naming_both_unless_asked_for(other, message):
    runs = [(A, run(1)), (B, run(2, **other))]
    with pytest.raises(StateError, match=message):
        combine.merge(runs)
    with pytest.raises(StateError, match=message):
        combine.subtract(*runs)
    merged = combine.merge(runs, allow_stale=True)
    if "state" in other:
        assert merged.state == "mixed"
    else:
        assert (merged.model, merged.model_name) == ("", "")


def test_runs_of_another_shape_or_other_layers_are_never_combined():
    for other in (run(2, experts=8), run(2, layers=(0, 1))):
        with pytest.raises(PlanError, match="they are of different models"):
            combine.merge([(A, run(1)), (B, other)], allow_stale=True)


def test_a_merge_needs_two_files_and_a_known_way():
    with pytest.raises(UsageError, match="two or more"):
        combine.merge([(A, run(1))])
    with pytest.raises(UsageError, match="--by 'max': choose one of sum, rank"):
        combine.merge([(A, run(1)), (B, run(2))], "max")


def test_a_run_differs_in_nothing_from_itself_whatever_its_length():
    a = run(1)
    longer = replace(a, sums={name: 3 * value for name, value in a.sums.items()})
    found = combine.diff(a, longer)
    for metric in METRICS:
        assert np.abs(found.share[metric]).max() < 1e-12
        assert found.rank_correlation[metric] == pytest.approx(1.0)
        assert found.overlap[metric] == 1.0


def test_a_difference_is_that_of_the_shares_and_ranks():
    def counts(rows: list[list[float]]) -> RoutingStats:
        sums = {name: np.array(rows) for name in SUMS}
        return RoutingStats(sums, (0,), model="m", state="s")

    found = combine.diff(counts([[1.0, 2.0, 3.0, 4.0]]), counts([[4.0, 3.0, 2.0, 1.0]]))
    np.testing.assert_allclose(found.share["freq"], [[-0.3, -0.1, 0.1, 0.3]])
    assert found.rank_correlation["freq"] == pytest.approx(-1.0)
    assert found.overlap["freq"] == 0.0


def test_files_are_compared_merged_and_purged_and_the_reports_say_how(tmp_path):
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    run(1).save(a)
    run(2).save(b)
    merged = merge_files((a, b), c)
    assert merged.summary() == (
        f"stats merge by sum: 23 samples, 600 tokens from 2 files; wrote {c}"
    )
    purged = subtract_files(c, b, tmp_path / "left.npz")
    assert purged.samples == 11
    found = diff_files(a, tmp_path / "left.npz", tmp_path / "d.json")
    assert found.rank_correlation["reap_sum"] == pytest.approx(1.0)
    assert all(abs(row.share_a - row.share_b) < 1e-9 for row in found.rows)
    document = json.loads((tmp_path / "d.json").read_text())
    assert document["layer_indices"] == [1, 3]
    assert np.array(document["share_difference"]["freq"]).shape == (2, 6)
    other = diff_files(a, b, None)
    assert other.path is None
    gaps = [abs(row.share_a - row.share_b) for row in other.rows]
    assert gaps == sorted(gaps, reverse=True)
    assert len(gaps) == 10
    by_rank = merge_files((a, b), c, "rank")
    assert by_rank.combined == "rank"
    assert by_rank.notices == ("the sums are ranks, higher is better: not counts of tokens",)
    with pytest.raises(DatasetError, match="does not exist"):
        merge_files((a, tmp_path / "none.npz"), c)


def test_a_session_prunes_by_a_merge_and_does_not_count_on_into_ranks(tmp_path):
    session = Session.open("demo")
    files = []
    for name in ("python", "medical"):
        session.collect(
            CollectOptions(DatasetOptions(f"demo:{name}", max_samples=4, max_tokens=32))
        )
        files.append(tmp_path / f"{name}.npz")
        session.save_stats(files[-1])
    merge_files(tuple(files), tmp_path / "both.npz", "rank")
    shown = session.load_stats(tmp_path / "both.npz")
    assert "merged by rank from 2 runs" in shown.summary()
    for metric in METRICS:
        plan = session.prune(PruneOptions(n_prune=4, metric=metric))
        scores = session.view().heat.metrics[metric]
        for row, gone in enumerate(plan.pruned.values()):
            kept = set(range(16)) - set(gone)
            assert max(scores[row, list(gone)]) <= min(scores[row, list(kept)])
    session.discard()
    assert "tokens" not in session.why(0, 0).verdict
    data = DatasetOptions("demo:mixed", max_samples=2, max_tokens=16)
    with pytest.raises(StateError, match="merged by rank, and tokens cannot be added to ranks"):
        session.collect(CollectOptions(data, add=True))
    session.close()


def test_who_was_alive_goes_through_a_file_and_a_merge_keeps_who_was_in_all(tmp_path: Path) -> None:
    one, two = np.ones((2, 6), bool), np.ones((2, 6), bool)
    one[0, 1] = two[1, 4] = False
    for by in ("sum", "rank"):
        merged = combine.merge([(A, run(1, alive=one)), (B, run(2, alive=two)), (C, run(3))], by)
        merged.save(tmp_path / "m.npz")
        back = RoutingStats.read(tmp_path / "m.npz")
        assert back.alive is not None
        assert back.alive.tolist() == (one & two).tolist()
    assert combine.merge([(A, run(1)), (B, run(2))]).alive is None
    assert combine.subtract((A, run(1, alive=one)), (B, run(1, alive=one))).alive is one


def without(stats: RoutingStats, name: str) -> RoutingStats:
    return replace(stats, sums={n: s for n, s in stats.sums.items() if n != name})


@pytest.mark.parametrize("by", combine.MERGE_RULES)
def test_a_sum_that_one_file_lacks_is_not_made_up_in_what_is_made_of_it(tmp_path, by):
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    run(1).save(a)
    without(run(2), "ean_sq_sum").save(b)
    report = merge_files((a, b), c, by)
    assert f"{b} has no msan, so neither has what is made of it" in report.notices
    assert set(RoutingStats.read(c).metrics) == set(METRICS) - {"msan"}
    with pytest.raises(StateError, match=r"have no (ean_sq_sum|msan_rank), which --metric msan"):
        RoutingStats.read(c).score("msan")
    assert set(diff_files(a, b, None).rank_correlation) == set(METRICS) - {"msan"}
    with pytest.raises(StateError, match="--metric msan"):
        diff_files(a, b, None, metric="msan")


def test_what_lacks_a_sum_is_still_taken_out(tmp_path):
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    combine.merge([(A, run(1)), (B, run(2))]).save(a)
    without(run(2), "ean_sq_sum").save(b)
    report = subtract_files(a, b, c)
    assert any("has no msan" in notice for notice in report.notices)
    np.testing.assert_allclose(RoutingStats.read(c).score("man"), run(1).score("man"))
