"""Experts that several runs agree to need least."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlxfun.calibration import ranking
from mlxfun.calibration.ranking import RankOptions
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.data.expert_lists import read_expert_list
from mlxfun.errors import PlanError, StateError, UsageError

RNG = np.random.default_rng(7)
ONE, TWO = (RNG.integers(0, 9, (2, 6)).astype(float) for _ in range(2))


def naive_ranks(score: np.ndarray) -> list[list[int]]:
    return [[1 + sum(other > x for other in row) for x in row] for row in score.tolist()]


def naive_choice(options: RankOptions) -> list[list[int]]:
    each = [naive_ranks(ONE), naive_ranks(TWO)]
    out = []
    for row in range(2):
        able = [
            e
            for e in range(6)
            if all(
                (options.min_rank or 1) <= one[row][e] <= (options.max_rank or 6) for one in each
            )
        ]
        able.sort(key=lambda e: (-sum(one[row][e] for one in each), -e))
        out.append(sorted(able[: options.n_prune] if options.n_prune else able))
    return out


@pytest.mark.parametrize(
    "options",
    [
        RankOptions(n_prune=2),
        RankOptions(min_rank=3),
        RankOptions(n_prune=1, min_rank=2, max_rank=6),
    ],
)
def test_the_choice_is_that_of_counting_one_by_one(options: RankOptions) -> None:
    each = [ranking.ranks(ONE), ranking.ranks(TWO)]
    assert [one.tolist() for one in each] == [naive_ranks(ONE), naive_ranks(TWO)]
    total, gone = ranking.choose(each, options)
    assert total.tolist() == (each[0] + each[1]).tolist()
    assert [np.flatnonzero(row).tolist() for row in gone] == naive_choice(options)


def test_model_wide_the_same_numbers_go_everywhere() -> None:
    each = [ranking.ranks(ONE), ranking.ranks(TWO)]
    total, gone = ranking.choose(each, RankOptions(n_prune=2, model_wide=True))
    expected = sorted(range(6), key=lambda e: (-int(total[:, e].sum()), -e))[:2]
    assert [np.flatnonzero(row).tolist() for row in gone] == [sorted(expected)] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (RankOptions(), UsageError, "say which experts to prune"),
        (RankOptions(min_rank=5, max_rank=2), UsageError, "no expert is within"),
        (
            RankOptions(n_prune=5, min_rank=6),
            PlanError,
            "are within the rank limits, 5 are to be pruned",
        ),
    ],
)
def test_limits_that_leave_nobody_are_said(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ranking.choose([ranking.ranks(ONE), ranking.ranks(TWO)], options)


def write(path, score: np.ndarray, state: str = "s"):
    sums = dict.fromkeys(SUMS, score)
    RoutingStats(sums, (1, 3), 4, 40, "m", "model", state).save(path)
    return path


def test_files_are_ranked_and_the_list_says_who_stays(tmp_path) -> None:
    a, b = write(tmp_path / "a.npz", ONE), write(tmp_path / "b.npz", TWO)
    report = ranking.rank_files((a, b), RankOptions(n_prune=2), tmp_path / "keep.json")
    assert list(report.chosen.values()) == [
        tuple(row) for row in naive_choice(RankOptions(n_prune=2))
    ]
    kept = read_expert_list(tmp_path / "keep.json", (1, 3), 6)
    assert {ly: tuple(sorted({*range(6)} - set(e))) for ly, e in kept.items()} == report.chosen
    assert report.rows[0].total == max(row.total for row in report.rows)
    assert json.dumps(report.data())


def test_one_file_is_no_comparison_and_five_are_too_many(tmp_path) -> None:
    path = write(tmp_path / "a.npz", ONE)
    for count in (1, 5):
        with pytest.raises(UsageError, match=f"compares 2 to 4 files, not {count}"):
            ranking.rank_files((path,) * count, RankOptions(n_prune=1))


def test_runs_of_different_weights_are_ranked_knowingly(tmp_path) -> None:
    a, b = write(tmp_path / "a.npz", ONE), write(tmp_path / "b.npz", TWO, state="t")
    with pytest.raises(StateError, match="--allow-stale"):
        ranking.rank_files((a, b), RankOptions(n_prune=1))
    assert ranking.rank_files((a, b), RankOptions(n_prune=1, allow_stale=True)).notices


# --- models that are pruned already ----------------------------------------------------------

ALIVE = np.array([[True, False, True, True, False, True], [True, True, False, True, True, True]])


def test_the_dead_are_not_chosen_however_the_limits_lie() -> None:
    each = [ranking.ranks(np.where(ALIVE, score, 0.0)) for score in (ONE, TWO)]
    for options in (RankOptions(n_prune=2), RankOptions(min_rank=1), RankOptions(max_rank=6)):
        _, gone = ranking.choose(each, options, ALIVE)
        assert gone.any(axis=1).all()
        assert not (gone & ~ALIVE).any()
    _, gone = ranking.choose(each, RankOptions(n_prune=1, model_wide=True), ALIVE)
    assert np.flatnonzero(gone[0]).tolist() in ([0], [3], [5])
    with pytest.raises(PlanError, match="only 4 experts of layer position 0 are within"):
        ranking.choose(each, RankOptions(n_prune=5), ALIVE)


def test_a_living_expert_that_was_never_chosen_still_goes_first() -> None:
    score = np.array([[5.0, 0.0, 0.0, 7.0]])
    each = [ranking.ranks(score)] * 2
    alive = np.array([[True, True, False, True]])
    _, gone = ranking.choose(each, RankOptions(n_prune=1), alive)
    assert gone.tolist() == [[False, True, False, False]]


def pruned(path, score: np.ndarray, alive: np.ndarray | None):
    sums = dict.fromkeys(SUMS, score if alive is None else np.where(alive, score, 0.0))
    RoutingStats(sums, (1, 3), 4, 40, "m", "model", "s", alive=alive).save(path)
    return path


def test_files_say_who_was_alive_and_the_list_keeps_no_other(tmp_path) -> None:
    a, b = pruned(tmp_path / "a.npz", ONE, ALIVE), pruned(tmp_path / "b.npz", TWO, None)
    report = ranking.rank_files((a, b), RankOptions(n_prune=2), tmp_path / "keep.json")
    gone = np.array([[e in report.chosen[ly] for e in range(6)] for ly in (1, 3)])
    assert gone.sum(axis=1).tolist() == [2, 2]
    assert not (gone & ~ALIVE).any()
    kept = read_expert_list(tmp_path / "keep.json", (1, 3), 6)
    assert [kept[ly] for ly in (1, 3)] == [
        tuple(np.flatnonzero(row).tolist()) for row in ALIVE & ~gone
    ]
    assert all(ALIVE[(1, 3).index(row.layer), row.expert] for row in report.rows)


def test_who_is_alive_in_the_session_counts_too(tmp_path) -> None:
    files = [pruned(tmp_path / f"{n}.npz", x, None) for n, x in (("a", ONE), ("b", TWO))]
    report = ranking.rank_files(files, RankOptions(n_prune=2), alive=ALIVE)
    assert all(ALIVE[row, e] for row, ly in enumerate((1, 3)) for e in report.chosen[ly])
    with pytest.raises(PlanError, match="of 2 layers x 6 experts, and the model has 1 x 6"):
        ranking.rank_files(files, RankOptions(n_prune=2), alive=ALIVE[:1])
