"""Which experts go, against literals, a naive twin, and invariants over random models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlxfun.errors import PlanError, UsageError
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.selection import adopt, select


def keep(scores: Any, constraints: Constraints | None = None, **options: Any) -> Any:
    scores = np.array(scores, dtype=np.float64)
    if constraints is None:
        constraints = Constraints.free(range(len(scores)), scores.shape[1], 1)
    return select(scores, constraints, PruneOptions(**options)).keep


def marks(shape: tuple[int, int], *pairs: tuple[int, int]) -> Any:
    mask = np.zeros(shape, dtype=np.bool_)
    for pair in pairs:
        mask[pair] = True
    return mask


def free(layers: int, experts: int, top_k: int = 1, **changes: Any) -> Constraints:
    return replace(Constraints.free(range(layers), experts, top_k), **changes)


def grouped(layers: int, experts: int, groups: int, active: int, top_k: int = 2) -> Constraints:
    return free(layers, experts, top_k, n_group=(groups,) * layers, topk_group=(active,) * layers)


# --- bottom ----------------------------------------------------------------------------------


def test_bottom_drops_the_lowest_of_each_layer() -> None:
    scores = [[5, 1, 4, 2], [1, 9, 8, 7]]
    assert keep(scores, n_prune=2) == ((0, 2), (1, 2))


def test_unrouted_experts_go_first() -> None:
    assert keep([[0.1, 0.0, 0.2, 0.0, 0.3]], n_prune=2) == ((0, 2, 4),)


def test_equal_scores_fall_by_traffic_and_then_by_index() -> None:
    traffic = np.array([[9.0, 3.0, 9.0, 3.0]])
    scores = [[1, 1, 1, 1]]
    assert keep(scores, free(1, 4, traffic=traffic), n_prune=1) == ((0, 1, 2),)
    assert keep(scores, free(1, 4, traffic=traffic), n_prune=3) == ((0,),)
    assert keep(scores, free(1, 4), n_prune=1) == ((0, 1, 2),)


def test_what_was_pruned_before_stays_gone_and_the_rest_keeps_its_numbers() -> None:
    alive = ~marks((1, 6), (0, 0), (0, 3))
    assert keep([[0, 5, 1, 0, 4, 2]], free(1, 6, alive=alive), n_prune=2) == ((1, 4),)


# --- strided ---------------------------------------------------------------------------------


def test_strided_takes_every_2nd_of_the_40_and_every_6th_of_the_120() -> None:
    scores = [list(range(160))]  # ascending: expert e has rank e
    gone = sorted(set(range(160)) - set(keep(scores, n_prune=40, strategy="strided")[0]))
    assert gone == [*range(0, 40, 2), *range(40, 160, 6)]


def test_an_odd_number_takes_one_more_from_the_unimportant() -> None:
    gone = set(range(12)) - set(keep([list(range(12))], n_prune=3, strategy="strided")[0])
    assert gone == {0, 1, 3}


def test_strided_pruning_never_takes_a_protected_expert() -> None:
    protect = marks((1, 12), (0, 0), (0, 1), (0, 4))
    constraints = free(1, 12, protect=protect)
    gone = set(range(12)) - set(
        keep([list(range(12))], constraints, n_prune=4, strategy="strided")[0]
    )
    # candidates 2,3,5,6 | 7,8,9,10,11: every 2nd of both halves
    assert gone == {2, 5, 7, 9}


def test_strided_takes_the_targeted_first() -> None:
    constraints = free(1, 12, target=marks((1, 12), (0, 11), (0, 10), (0, 9)))
    gone = set(range(12)) - set(
        keep([list(range(12))], constraints, n_prune=5, strategy="strided")[0]
    )
    assert gone == {9, 10, 11, 0, 2}


def test_strided_falls_back_on_the_unimportant_when_there_are_few_others() -> None:
    gone = set(range(6)) - set(keep([list(range(6))], n_prune=5, strategy="strided")[0])
    assert gone == {0, 1, 2, 3, 5}


# --- model-wide ------------------------------------------------------------------------------


def test_model_wide_drops_the_same_indices_after_weighing_layers_alike() -> None:
    # Raw sums would drop expert 2 (3000.4), which is the runner-up in the second layer.
    scores = [[3000, 4000, 3000], [0.5, 0.1, 0.4]]
    assert keep(scores, n_prune=1, model_wide=True) == ((0, 2), (0, 2))


def test_a_layer_without_any_traffic_weighs_nothing() -> None:
    assert keep([[0, 0, 0], [3, 1, 2]], n_prune=1, model_wide=True) == ((0, 2), (0, 2))


def test_model_wide_spares_an_index_that_is_protected_anywhere() -> None:
    scores = [[1, 2, 3], [1, 2, 3]]
    constraints = free(2, 3, protect=marks((2, 3), (1, 0)))
    assert keep(scores, constraints, n_prune=1, model_wide=True) == ((0, 2), (0, 2))


def test_model_wide_takes_only_indices_that_are_alive_everywhere() -> None:
    alive = ~marks((2, 4), (0, 0), (1, 1))
    constraints = free(2, 4, alive=alive)
    scores = [[9, 1, 5, 6], [1, 9, 5, 6]]
    assert keep(scores, constraints, n_prune=1, model_wide=True) == ((1, 3), (0, 3))
    with pytest.raises(PlanError, match="only 2 indices are unprotected in every layer"):
        keep(scores, replace(constraints, top_k=(0, 0)), n_prune=3, model_wide=True)


# --- protection and targets ------------------------------------------------------------------


def test_protection_outweighs_any_score_and_target_any_merit() -> None:
    protect, target = marks((1, 4), (0, 0)), marks((1, 4), (0, 3))
    constraints = free(1, 4, protect=protect, target=target)
    assert keep([[0, 1, 2, 99]], constraints, n_prune=2) == ((0, 2),)


def test_an_expert_both_protected_and_targeted_stays_and_is_mentioned() -> None:
    both = marks((1, 4), (0, 0))
    result = select(
        np.array([[0.0, 1, 2, 3]]),
        free(1, 4, protect=both, target=both),
        PruneOptions(n_prune=1),
    )
    assert result.keep == ((0, 2, 3),)
    assert result.warnings == ("1 targeted experts are protected too, and stay",)


def test_more_targets_than_places_are_mentioned() -> None:
    target = marks((1, 4), (0, 1), (0, 2), (0, 3))
    result = select(np.array([[0.0, 3, 2, 1]]), free(1, 4, target=target), PruneOptions(n_prune=2))
    assert result.keep == ((0, 1),)
    assert result.warnings == (
        "1 targeted experts stay: give a larger --n-prune, or a list without them",
    )


@pytest.mark.parametrize("model_wide", [False, True])
def test_ignored_experts_are_never_pruned(model_wide: bool) -> None:
    scores = [[0, 1, 2, 3], [0, 1, 2, 3]]
    kept = keep(scores, n_prune=2, ignore_experts=(0, 1), model_wide=model_wide)
    assert kept == ((0, 1), (0, 1))


def test_a_list_from_elsewhere_may_not_remove_protected_experts() -> None:
    alive = ~marks((2, 4), (1, 3))
    protect = marks((2, 4), (0, 1), (0, 2), (1, 3))
    constraints = replace(Constraints.free((1, 2), 4, 1), alive=alive, protect=protect)
    found = adopt({1: (1, 2), 2: (0, 1)}, constraints, PruneOptions())  # L2:E3 was gone before
    assert found.keep == ((1, 2), (0, 1))
    with pytest.raises(PlanError, match=r"removes 2 protected experts: L1:E1, L1:E2; change"):
        adopt({1: (0, 3), 2: (0, 1)}, constraints, PruneOptions())


def test_a_list_made_elsewhere_is_held_to_the_other_options_too() -> None:
    constraints = free(1, 4, target=marks((1, 4), (0, 3)))
    listed = {0: (2, 3)}
    with pytest.raises(PlanError, match=r"removes 1 protected experts: L0:E1; change"):
        adopt(listed, constraints, PruneOptions(ignore_experts=(1,)))
    with pytest.raises(PlanError, match=r"keeps 2 experts in layer 0, fewer than .* 3; change"):
        adopt(listed, constraints, PruneOptions(min_experts_per_layer=3))
    with pytest.raises(UsageError, match="leave out --n-prune 2 and --strategy strided"):
        adopt(listed, constraints, PruneOptions(n_prune=2, strategy="strided"))
    assert adopt(listed, constraints, PruneOptions()).warnings == (
        "1 targeted experts stay: give a larger --n-prune, or a list without them",
    )


# --- groups ----------------------------------------------------------------------------------


def test_each_group_loses_the_same_number() -> None:
    # By score alone all of the first group would go.
    scores = [[1, 2, 3, 4, 50, 60, 70, 80]]
    assert keep(scores, grouped(1, 8, 2, 1), n_prune=4) == ((2, 3, 6, 7),)
    assert keep(scores, grouped(1, 8, 2, 1), n_prune=2, strategy="strided") == ((1, 2, 3, 5, 6, 7),)


def test_model_wide_pruning_respects_the_groups() -> None:
    scores = [[1, 2, 3, 4, 50, 60, 70, 80]] * 2
    assert keep(scores, grouped(2, 8, 2, 1), n_prune=2, model_wide=True) == (
        (1, 2, 3, 5, 6, 7),
        (1, 2, 3, 5, 6, 7),
    )


def test_a_second_pruning_of_a_grouped_router_uses_the_same_groups() -> None:
    alive = ~marks((1, 12), (0, 0), (0, 1), (0, 10), (0, 11))
    constraints = replace(grouped(1, 12, 2, 1), alive=alive)
    scores = [[0, 0, 5, 6, 7, 8, 1, 2, 3, 4, 0, 0]]
    assert keep(scores, constraints, n_prune=2) == ((3, 4, 5, 7, 8, 9),)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, r"cannot be taken evenly .* 2 groups .*: --n-prune 2 or --n-prune 4"),
        (1, r"cannot be taken evenly .* 2 groups .*: --n-prune 2$"),
        (6, r"leave 2 of 8 .*each of which must keep 2 experts for top-2; at most --n-prune 4"),
    ],
)
def test_a_number_that_breaks_the_groups_names_the_nearest_that_do_not(
    count: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        keep([list(range(8))], grouped(1, 8, 2, 1), n_prune=count)


def test_groups_must_keep_enough_for_top_k() -> None:
    # top-4 from 1 of 2 groups needs 4 experts a group.
    with pytest.raises(PlanError, match="must keep 4 experts for top-4; nothing can be pruned"):
        keep([list(range(8))], grouped(1, 8, 2, 1, top_k=4), n_prune=2)
    assert len(keep([list(range(8))], grouped(1, 8, 2, 2, top_k=4), n_prune=4)[0]) == 4


def test_a_group_short_of_unprotected_experts_is_named() -> None:
    protect = marks((1, 8), (0, 0), (0, 1), (0, 2))
    constraints = replace(grouped(1, 8, 2, 2), protect=protect)
    with pytest.raises(PlanError, match="a group of layer 0 has only 1 unprotected experts; at m"):
        keep([list(range(8))], constraints, n_prune=4)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "prune needs --n-prune"),
        ({"n_prune": 0}, UsageError, "--n-prune 0 must be at least 1"),
        ({"n_prune": -3}, UsageError, "--n-prune -3 must be at least 1"),
        ({"n_prune": 1, "strategy": "best"}, UsageError, "choose one of bottom, strided"),
        ({"n_prune": 1, "min_experts_per_layer": 0}, UsageError, "must be at least 1"),
        ({"n_prune": 1, "ignore_experts": (2, 8)}, PlanError, "--ignore-experts names 8.*0..7"),
        ({"n_prune": 5}, PlanError, "leave 3 of 8.*layer 2 .* 4 experts; at most --n-prune 4"),
        ({"n_prune": 99}, PlanError, "at most --n-prune 4 is possible"),
        (
            {"n_prune": 3, "min_experts_per_layer": 6},
            PlanError,
            "--min-experts-per-layer 6 must be left; at most --n-prune 2",
        ),
        (
            {"n_prune": 4, "ignore_experts": (0, 1, 2, 3, 4)},
            PlanError,
            "layer 2 has only 3 unprotected experts; at most --n-prune 3",
        ),
        (
            {"n_prune": 1, "ignore_experts": tuple(range(8))},
            PlanError,
            "has only 0 unprotected experts; nothing can be pruned",
        ),
    ],
)
def test_an_impossible_request_is_refused_with_figures_and_remedy(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    constraints = Constraints.free((2, 3), 8, 4)
    with pytest.raises(error, match=message):
        keep([list(range(8))] * 2, constraints, **options)


def test_scores_of_another_shape_or_damaged_ones_are_refused() -> None:
    constraints = Constraints.free((1, 2), 4, 1)
    with pytest.raises(PlanError, match="scores are for 1 layers x 4 experts, the model has 2 x 4"):
        keep([[1, 2, 3, 4]], constraints, n_prune=1)
    with pytest.raises(PlanError, match="the score of L2:E3 is nan"):
        keep([[1, 2, 3, 4], [1, 2, 3, np.nan]], constraints, n_prune=1)


def test_exactly_top_k_is_a_warning() -> None:
    scores, constraints = np.arange(8.0)[None], Constraints.free((0,), 8, 4)
    assert select(scores, constraints, PruneOptions(n_prune=3)).warnings == ()
    (warning,) = select(scores, constraints, PruneOptions(n_prune=4)).warnings
    assert warning.startswith("4 experts are left, exactly the top-k")
