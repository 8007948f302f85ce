"""What an applied edit replaced: kept for undo while there is room, read back where there is none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from rigs import StopAt

from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing import replaced
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled
from mlxfun.model.device.memory import Need
from mlxfun.techniques.merge.options import MergeOptions

TOKENS = [[3, 14, 15, 9, 26, 5, 35]]


@pytest.fixture
def merged(session):
    """A session with a merge that is staged; how often the checkpoint was opened."""
    opened, real = [], session.editor.resident._checkpoint
    session.editor.resident._checkpoint = lambda: opened.append(1) or real()
    data = DatasetOptions("demo:mixed", max_samples=2, max_tokens=32)
    before = logits(session)
    session.merge(MergeOptions(data, n_prune=8))
    yield session, opened, before
    session.editor.resident._checkpoint = real


def logits(session) -> np.ndarray:
    return np.array(session.model(mx.array(TOKENS)).astype(mx.float32))


def test_with_room_undo_reads_nothing(merged) -> None:
    session, opened, before = merged
    step = session.apply(ApplyOptions())
    assert step.undo_reads == 0
    assert "undo will read" not in step.summary()
    opened.clear()
    session.undo()
    assert opened == []
    np.testing.assert_array_equal(logits(session), before)
    session.redo()
    session.undo()
    np.testing.assert_array_equal(logits(session), before)


def test_without_room_apply_says_what_undo_will_read_and_for_how_long(merged, monkeypatch) -> None:
    session, opened, before = merged
    monkeypatch.setattr(replaced, "KEPT_SHARE", 0.0)
    step = session.apply(ApplyOptions())
    stacks = sum(
        session.editor.resident.tree.get(p.path).nbytes
        for moe in session.anatomy.layers
        for p in moe.expert_parameters()
    )
    # The new stacks are those of the experts that are left: half of what is read back.
    assert step.undo_reads == 2 * stacks
    assert step.undo_seconds == step.undo_reads / session.editor.replaced.read_rate
    assert "undo will read" in step.summary()

    class Shown(Context):
        def __init__(self) -> None:
            self.steps = []

        def progress(self, label, done, total=None, unit="") -> None:
            self.steps.append((done, total))

    shown = Shown()
    opened.clear()
    session.undo(shown)
    assert opened
    layers = len(session.anatomy.layers)
    assert shown.steps == [(n + 1, layers) for n in range(layers)]
    np.testing.assert_array_equal(logits(session), before)


def test_a_cancelled_undo_stays_where_it_was(merged, monkeypatch) -> None:
    session, _, before = merged
    monkeypatch.setattr(replaced, "KEPT_SHARE", 0.0)
    session.apply(ApplyOptions())
    after, state = logits(session), session.editor.state

    with pytest.raises(Cancelled):
        session.undo(StopAt(3))
    assert session.editor.state == state
    np.testing.assert_array_equal(logits(session), after)
    session.undo()
    np.testing.assert_array_equal(logits(session), before)


def test_what_is_kept_makes_way_for_what_needs_the_room(merged, monkeypatch) -> None:
    session, opened, before = merged
    session.apply(ApplyOptions())
    kept = session.editor.replaced.bytes
    assert kept > 0
    workspace = session._workspace
    limit = mx.get_active_memory() + kept // 2
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: limit)
    workspace.require_room(Need((), kept), "this test", "ask for less")
    assert session.editor.replaced.bytes == 0
    with pytest.raises(BudgetError, match="this test needs about"):
        workspace.require_room(Need((), kept * 4), "this test", "ask for less")
    opened.clear()
    session.undo()
    assert opened
    np.testing.assert_array_equal(logits(session), before)


def test_an_undo_budget_counts_what_is_kept(merged) -> None:
    session, _, _ = merged
    session.editor.history.budget = session.editor.resident.readable_bytes(
        session.editor.staged.edge
    )
    session.editor.history.budget -= 1
    try:
        assert session.apply(ApplyOptions()).undo_reads > 0
    finally:
        session.editor.history.budget = None
