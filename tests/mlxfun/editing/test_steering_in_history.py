"""A state is weights and steering: undo takes back either, redo brings it back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import StateError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import SelectOptions

UP, DOWN = {3: (7,)}, {5: (2,)}


@pytest.fixture
def fresh():
    from mlxfun import Session

    session = Session.open("demo")
    yield session
    session.close()


def logits(session) -> np.ndarray:
    out = session.model(mx.array([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]]))
    return np.array(out.astype(mx.float32))


def drop(session, expert: int) -> None:
    session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (expert,))))


def test_undo_takes_back_a_steer_and_then_the_edit_before_it(fresh):
    plain = logits(fresh)
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    pruned = logits(fresh)
    fresh.steer(SteerOptions(activate=UP))
    steered = logits(fresh)
    assert not np.array_equal(steered, pruned)
    step = fresh.undo()
    assert step.command == "steer --clear --activate 3:7", "it says what was undone"
    assert np.array_equal(logits(fresh), pruned)
    assert fresh.view().steering.activated == {}
    fresh.undo()
    assert np.array_equal(logits(fresh), plain)
    fresh.redo()
    fresh.redo()
    assert np.array_equal(logits(fresh), steered)
    assert fresh.view().steering.activated == UP


def test_the_tree_shows_both_kinds_of_steps_and_what_steers_each_state(fresh):
    fresh.steer(SteerOptions(activate=UP, deactivate=DOWN))
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    nodes = fresh.history().nodes
    assert [(node.parent, node.steering) for node in nodes] == [
        (None, ""),
        (0, "1 forced on, 1 forced off"),
        (1, "1 forced on, 1 forced off"),
    ]
    assert nodes[1].state == nodes[0].state, "a state of weights is the same state"
    assert nodes[1].bytes == 0


def test_going_to_a_state_brings_its_steering(fresh):
    fresh.steer(SteerOptions(activate=UP))
    fresh.steer(SteerOptions(clear=True, deactivate=DOWN))
    fresh.goto(1)
    assert fresh.view().steering.activated == UP
    assert fresh.view().steering.deactivated == {}
    fresh.goto(0)
    assert fresh.view().steered == ""


def test_steering_that_changes_nothing_is_no_step(fresh):
    fresh.steer(SteerOptions(activate=UP))
    fresh.steer(SteerOptions(activate=UP))
    assert len(fresh.history().nodes) == 2


def test_while_a_plan_is_staged_a_steer_can_be_undone_and_an_edit_cannot(fresh):
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    drop(fresh, 4)
    fresh.steer(SteerOptions(activate=UP))
    fresh.undo()
    assert fresh.view().steering.activated == {}
    assert fresh.view().plan is not None
    with pytest.raises(StateError, match="a plan is staged"):
        fresh.undo()
    fresh.steer(SteerOptions(activate=UP))
    fresh.apply(ApplyOptions())
    assert fresh.view().steering.activated == UP


def test_commands_that_make_the_weights_leave_steering_out(fresh):
    fresh.steer(SteerOptions(activate=UP))
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    (line,) = fresh.editor.history.recipe()
    assert line.startswith("select --drop")


def test_as_before_steering_was_part_of_it_a_steer_outlives_undo(fresh):
    fresh.steering_in_history = False
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    fresh.steer(SteerOptions(activate=UP))
    root = fresh.editor.root_state
    fresh.undo()
    assert (fresh.state, fresh.view().steering.activated) == (root, UP)
    fresh.steering_in_history = True
    fresh.redo()
    assert fresh.view().steering.activated == UP, "the state knows what steered it last"


def test_what_is_live_is_known_while_it_is_borrowed(fresh):
    root = fresh.editor.root_state
    drop(fresh, 1)
    fresh.apply(ApplyOptions())
    fresh.steer(SteerOptions(activate=UP))
    here = fresh.editor.key()
    assert here[0] != root
    with fresh.editor.live("checkpoint"):
        assert fresh.editor.key() == (root, "")
        assert fresh.editor.state == here[0], "where the history stands is another question"
    assert fresh.editor.key() == here
    drop(fresh, 4)
    staged = fresh.editor.key()
    with fresh.editor.live("base"):
        assert fresh.editor.key() == here
    with fresh.editor.unsteered():
        assert fresh.editor.key() == (staged[0], "")
    assert fresh.editor.key() == staged


def test_a_steered_state_is_measured_against_the_checkpoint_only_once(fresh):
    """Cache keys come from what is live: the reference of the checkpoint serves both."""
    options = EvaluateOptions((DatasetOptions("demo:eval", max_samples=2, max_tokens=32),))
    plain = fresh.evaluate(options)
    fresh.steer(SteerOptions(activate=UP))
    steered = fresh.evaluate(options)
    assert steered.baseline == plain.baseline
    assert steered.kl_mean > 0 == plain.kl_mean
