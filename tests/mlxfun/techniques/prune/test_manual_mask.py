"""Picking by hand: quick arithmetic that agrees with what the engine then does."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions
from mlxfun.generation.options import GenerateOptions
from mlxfun.techniques.merge.plan import MergePlan
from mlxfun.techniques.prune import manual_mask
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions

SCORES = np.array([[4.0, 1, 3, 2, 6, 5, 8, 7], [1.0, 2, 3, 4, 5, 6, 7, 8]])


def field(groups: int = 1, top_k: int = 2, **changes) -> manual_mask.Field:
    values = {
        "layers": (3, 5),
        "alive": np.ones((2, 8), bool),
        "protected": np.zeros((2, 8), bool),
        "scores": SCORES,
        "top_k": (top_k,) * 2,
        "groups": (groups,) * 2,
        "open_groups": (1,) * 2,
    }
    return manual_mask.Field(**{**values, **changes})


def mask(*sets: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((2, 8), bool)
    for row, experts in enumerate(sets):
        out[row, list(experts)] = True
    return out


def chosen(gone: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in gone]


def naive_even(scores: np.ndarray, gone: np.ndarray, count: int) -> list[list[int]]:
    """One expert at a time, the worst stays out or the best comes back."""
    out = []
    for score, row in zip(scores, gone, strict=True):
        going = set(np.flatnonzero(row).tolist())
        while len(going) < count:
            going.add(min(set(range(len(score))) - going, key=lambda e: (score[e], -e)))
        while len(going) > count:
            going.remove(max(going, key=lambda e: (score[e], -e)))
        out.append(sorted(going))
    return out


def test_evening_out_adds_the_lowest_scores_up_to_the_layer_that_loses_most() -> None:
    gone = manual_mask.evened(field(), mask((6,), (7, 6, 5)))
    assert chosen(gone) == [[1, 3, 6], [5, 6, 7]]


@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
def test_dialling_a_count_agrees_with_taking_experts_one_at_a_time(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.integers(0, 5, (2, 8)).astype(float)  # with ties
    start = rng.random((2, 8)) < 0.4
    gone = manual_mask.evened(field(scores=scores), start, count)
    assert chosen(gone) == naive_even(scores, start, count)


def test_a_protected_expert_is_never_added_but_may_be_picked_by_name() -> None:
    shielded = field(protected=mask((1,), (0,)))
    assert chosen(manual_mask.evened(shielded, mask((), ()), 1)) == [[3], [1]]
    assert chosen(manual_mask.picked(shielded, mask((), ()), SelectOptions(drop={3: (1,)}))) == [
        [1],
        [],
    ]


def test_groups_lose_the_same_number_each() -> None:
    gone = manual_mask.evened(field(groups=2), mask((1, 3), ()), 4)
    assert chosen(gone) == [[1, 3, 4, 5], [0, 1, 4, 5]]
    assert manual_mask.evened(field(groups=2), mask((1, 3), ())).sum(axis=1).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("kind", "gone", "sentence"),
    [
        ({}, mask(range(7), ()), "layer 3 would keep 1 expert, and every token uses 2"),
        (
            {"groups": 2},
            mask((0,), ()),
            "layer 3 would keep 3, 4 experts in its 2 groups; each must keep the same number, at "
            "least 2",
        ),
        ({"groups": 2}, mask((0, 4), (1, 5)), ""),
        ({}, mask((0, 1, 2), ()), ""),
    ],
)
def test_what_could_not_run_is_said_before_it_is_tried(kind, gone, sentence: str) -> None:
    assert field(**kind).unrunnable(gone) == sentence


def test_the_most_that_can_go_leaves_the_top_k_or_two_in_each_group() -> None:
    assert field().most() == 6
    assert field(groups=2).most() == 4
    with pytest.raises(PlanError, match="7 experts per layer cannot be pruned; at most 6 can"):
        manual_mask.evened(field(), mask((), ()), 7)


def test_a_threshold_takes_all_with_a_smaller_share_of_their_layer() -> None:
    # Both layers sum to 36: below a tenth are 1, 2 and 3.
    assert chosen(manual_mask.below(field(), mask((7,), ()), 0.1)) == [[1, 2, 3, 7], [0, 1, 2]]


def test_the_line_of_a_change_makes_that_change() -> None:
    before, after = mask((0, 1, 2), (4,)), mask((2, 3, 5), (4, 6, 7))
    line = manual_mask.change_line((3, 5), before, after)
    assert line == "select --drop 3:3,3:5,5:6..7 --keep 3:0..1"
    assert manual_mask.change_line((3, 5), before, before) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (SelectOptions(drop={4: (0,)}), "decoder layer 4 is not an MoE layer; they are 3..5"),
        (SelectOptions(drop={3: (8,)}), r"layer 3 has no expert 8; they are 0\.\.7"),
        (SelectOptions(drop={3: (1,)}, keep={3: (1,)}), "3:1 cannot be both pruned and kept"),
        (SelectOptions(drop={5: (0,)}), "expert 0 of layer 5 is pruned already"),
    ],
)
def test_a_wrong_pick_is_named(change: SelectOptions, message: str) -> None:
    alive = np.ones((2, 8), bool)
    alive[1, 0] = False
    with pytest.raises((PlanError, UsageError), match=message):
        manual_mask.picked(field(alive=alive), mask((), ()), change)


def test_many_odd_layers_are_counted_not_all_named() -> None:
    said = manual_mask.unevenness(range(8), (1, 2, 3, 4, 5, 0, 0, 0))
    assert said == (
        "layer 0 loses 1 expert; layer 1 loses 2 experts; layer 2 loses 3 experts; "
        "2 more differ, the others 0"
    )


# --- on the demo model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    session = Session.open("demo")
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48)))
    yield session
    session.close()


def test_a_selection_grows_step_by_step_and_is_the_staged_plan(session) -> None:
    session.select(SelectOptions(drop={0: (3,)}))
    plan = session.select(SelectOptions(drop={1: (4, 5)}, keep={0: (3,)}))
    assert {layer: e for layer, e in plan.pruned.items() if e} == {1: (4, 5)}
    assert session.view().heat.condemned.sum() == 2
    assert session.view().live == "candidate"


def test_bytes_and_shares_foreseen_are_those_of_the_plan(session) -> None:
    plan = session.select(SelectOptions(drop={0: (3,), 1: (4, 5)}))
    view = session.view()
    gone = view.heat.condemned
    assert plan.bytes_before - plan.bytes_after == manual_mask.saved(view.model.expert_bytes, gone)
    score = view.heat.metrics["reap_sum"]
    assert plan.mass_lost[1] == pytest.approx((score[1, 4] + score[1, 5]) / score[1].sum())


def test_an_uneven_selection_answers_and_is_probed_but_not_applied(session) -> None:
    session.select(SelectOptions(drop={0: (3,), 1: (4, 5)}))
    session.chat("Hello", GenerateOptions(max_tokens=2))
    probe = session.probe(ProbeOptions(tokens=64))
    assert probe.measured_state == session.view().plan.state_after
    assert probe.kl_mean > 0
    assert session.view().scores is None
    with pytest.raises(PlanError, match="layer 0 loses 1 expert; layer 1 loses 2 experts"):
        session.apply(ApplyOptions())
    assert session.view().plan is not None


def test_a_probe_of_everything_gives_the_figures_of_a_preview(session) -> None:
    session.select(SelectOptions(n_prune=2))
    probe = session.probe(ProbeOptions(tokens=10**6))
    preview = session.preview(EvaluateOptions())
    assert (probe.perplexity, probe.kl_mean) == (preview.perplexity["all"], preview.kl_mean)


def test_evened_out_by_score_it_is_a_prune_and_applies(session) -> None:
    session.prune(PruneOptions(n_prune=2))
    by_score = session.view().plan.state_after
    session.select(SelectOptions(clear=True, n_prune=2))
    assert session.view().plan.state_after == by_score
    session.apply(ApplyOptions())
    assert session.state == by_score
    session.undo()


def test_without_anybody_left_in_it_the_plan_is_dropped(session) -> None:
    session.select(SelectOptions(drop={0: (3,)}))
    report = session.select(SelectOptions(keep={0: (3,)}))
    assert report.kind == "step"
    assert session.view().plan is None
    with pytest.raises(UsageError, match="no expert is picked"):
        session.select(SelectOptions(keep={0: (3,)}))


def test_what_cannot_run_changes_nothing(session) -> None:
    staged = session.select(SelectOptions(drop={0: (3,)}))
    with pytest.raises(PlanError, match="layer 2 would keep 1 expert, and every token uses 2"):
        session.select(SelectOptions(drop={2: tuple(range(15))}))
    assert session.view().plan is staged


def test_scores_of_another_state_are_used_knowingly_only(session) -> None:
    session.select(SelectOptions(n_prune=1))
    session.apply(ApplyOptions())
    with pytest.raises(StateError, match="--allow-stale"):
        session.select(SelectOptions(n_prune=1))
    plan = session.select(SelectOptions(n_prune=1, allow_stale=True))
    assert plan.experts_after == 14


def test_a_merge_is_not_picked_apart(session) -> None:
    session.select(SelectOptions(drop={0: (3,)}))
    session.editor.staged.plan = MergePlan({0: {1: (1, 3)}}, {0: {1: 0.5, 3: 0.5}})
    with pytest.raises(StateError, match="merge is staged"):
        session.select(SelectOptions(drop={0: (3,)}))


def test_history_and_recipe_tell_a_selection_made_in_steps_as_it_stands(session) -> None:
    for line, change in (
        ("select --drop 0:3", SelectOptions(drop={0: (3,)})),
        ("select --even", SelectOptions(even=True)),
    ):
        session.command = line
        plan = session.select(change)
    session.apply(ApplyOptions())
    node = session.editor.history.current
    whole = ",".join(f"{layer}:{e}" for layer, experts in plan.pruned.items() for e in experts)
    assert node.recipe[-1] == node.command == f"select --drop {whole}"
    assert [line.split()[0] for line in node.recipe] == ["collect", "select"]
