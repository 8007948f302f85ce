"""Steering while the model changes under it: prunes, plans on trial, and bakes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import SelectOptions


def logits(session) -> np.ndarray:
    out = session.model(mx.array([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]]))
    return np.array(out.astype(mx.float32))


def stage(session, *experts: int) -> None:
    session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, experts)))


def test_steering_goes_on_after_a_steered_expert_is_pruned(session) -> None:
    session.steer(SteerOptions({3: (14,)}, {3: (13, 2)}, levels={3: {12: 1.0}, 4: {14: 2.0}}))
    stage(session, 12, 13, 14)
    session.apply(ApplyOptions())
    report = session.steer(SteerOptions(levels={5: {0: 1.0}}))
    assert report.notices == (
        "layer 3: experts [12, 13, 14] are pruned and no longer steered",
        "layer 4: experts [14] are pruned and no longer steered",
    )
    assert (report.activated, report.deactivated) == ({}, {3: (2,)})
    assert report.levels == {5: {0: 1.0}}
    assert session.steer(SteerOptions(levels={5: {0: 2.0}})).notices == ()


def test_who_is_pruned_cannot_be_named_anew(session) -> None:
    session.steer(SteerOptions({3: (14,)}))
    stage(session, 14)
    session.apply(ApplyOptions())
    for options in (SteerOptions({3: (14,)}), SteerOptions(levels={3: {14: 1.0}})):
        with pytest.raises(
            PlanError,
            match=r"expert 14 is pruned in the live model; flip to .* undo if it is applied",
        ):
            session.steer(options)
    assert session.view().steering.activated == {3: (14,)}, "what was in force stays"


def test_a_plan_on_trial_takes_nothing_from_the_steering(session) -> None:
    session.steer(SteerOptions({3: (14,)}, {3: (2,)}))
    stage(session, 14)
    assert session.steer(SteerOptions({3: (5,)})).notices == ()
    session.discard()
    assert session.view().steering.activated == {3: (5, 14)}
    steered = logits(session)
    session.steer(SteerOptions({3: (5, 14)}, {3: (2,)}, clear=True))
    assert np.array_equal(logits(session), steered)


def test_the_figures_of_a_refusal_count_the_living(session) -> None:
    session.steer(SteerOptions(deactivate={3: tuple(range(8))}))
    stage(session, 0, 1, 2)
    top_k = session.anatomy.layers[3].top_k
    with pytest.raises(PlanError, match=f"of 13 experts .* at most {13 - top_k}"):
        session.steer(SteerOptions(deactivate={3: tuple(range(8, 8 + 8 - top_k + 1))}))


def test_a_line_that_repeats_what_is_in_force_goes_on_too(session) -> None:
    """The mixer and the keys say all of the steering anew, with --clear."""
    session.steer(SteerOptions({3: (14,)}, {3: (2,)}, levels={4: {14: 2.0}}))
    stage(session, 14)
    whole = SteerOptions({3: (14,), 5: (1,)}, {3: (2,)}, levels={4: {14: 2.0}}, clear=True)
    assert session.steer(whole).notices == ()
    session.discard()
    assert session.view().steering.activated == {3: (14,), 5: (1,)}
    stage(session, 14)
    session.apply(ApplyOptions())
    report = session.steer(whole)
    assert report.notices == (
        "layer 3: experts [14] are pruned and no longer steered",
        "layer 4: experts [14] are pruned and no longer steered",
    )
    assert (report.activated, report.deactivated, report.levels) == ({5: (1,)}, {3: (2,)}, {})
    with pytest.raises(
        PlanError, match=r"expert 14 is pruned in the live model; flip to .* undo if it is applied"
    ):
        session.steer(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SteerOptions({3: (14,)}, levels={3: {2: 1000.0}}, clear=True), "the level 1000 is beyond"),
        (SteerOptions(deactivate={3: tuple(range(1, 16))}, clear=True), "of 16 experts leaves 1"),
        (SteerOptions({3: (14,), 2: (99,)}, clear=True), "layer 2 has no expert 99"),
    ],
)
def test_what_is_said_anew_in_another_way_is_checked(session, options, message) -> None:
    session.steer(SteerOptions({3: (14,)}, {3: (1,)}, levels={3: {2: 1.0}}))
    with pytest.raises(PlanError, match=message):
        session.steer(options)
