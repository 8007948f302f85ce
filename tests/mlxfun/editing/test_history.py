"""The tree of states under a budget and under cancels: wherever it stops, it says where it is."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, StateError
from mlxfun.events import Notice
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions

MIXED = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
REFIT = PruneOptions(n_prune=4, refit_experts=True)
MIB = 1 << 20


@pytest.fixture
def session():
    """The demo with statistics, of its own: its history begins here and has a budget of 1 MiB."""
    session = Session.open("demo", undo_budget=MIB)
    session.collect(MIXED)
    yield session
    session.close()


def logits(session) -> np.ndarray:
    out = session.model(mx.array([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]]))
    return np.array(out.astype(mx.float32))


def drop(session, expert: int) -> int:
    """Prune one expert of every layer by hand; the node that makes."""
    session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (expert,))))
    return session.apply(ApplyOptions()).node


class Listener(Context):
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event) -> None:
        if isinstance(event, Notice):
            self.said.append(event.text)


class CancelledAt(Context):
    """Cancelled at the n-th check and, like a job's context, at every check from then on."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("cancelled")


def test_a_compact_over_the_undo_budget_leaves_the_model_and_its_way_back(session):
    base, root = logits(session), session.state
    session.prune(REFIT)
    session.apply(ApplyOptions())
    refitted, stack = logits(session), list(session.editor.resident.stack)
    # Compacting would have to hold the refitted stacks: what the edit made.
    with pytest.raises(BudgetError, match=r"would need 3.0 MiB .* the undo budget of 1.0 MiB"):
        session.compact()
    assert session.editor.resident.stack == stack, "nothing is sliced"
    assert np.array_equal(logits(session), refitted)
    session.undo()
    assert (session.state, np.array_equal(logits(session), base)) == (root, True)


def test_a_step_that_holds_nothing_is_never_refused(session):
    session.prune(REFIT)
    session.apply(ApplyOptions())
    session.undo()
    assert session.history().bytes_held > MIB, "what redo needs is held over the budget"
    assert drop(session, 5) == 2
    session.goto(1)
    assert session.history().current == 1, "the undone branch is still there"


def test_branches_that_lead_away_from_here_make_room_and_that_is_said(session):
    base = logits(session)
    session.prune(REFIT)
    session.apply(ApplyOptions())
    session.undo()
    session.editor.history.budget = 4 * MIB
    # A second refit, whose compact holds 3 MiB: the first one, undone, has to go for it.
    session.prune(PruneOptions(n_prune=2, refit_experts=True))
    session.apply(ApplyOptions())
    refitted, listener = logits(session), Listener()
    with pytest.raises(Cancelled):
        session.compact(CancelledAt(3))
    assert len(session.history().nodes) == 3, "a compact that is cancelled drops nothing"
    session.compact(listener)
    assert listener.said == [
        "node 1 (prune --n-prune 4 --refit-experts) is dropped from the history: 3.0 MiB to keep "
        "within the undo budget; its command makes it again"
    ]
    report = session.history()
    assert [(n.id, n.parent) for n in report.nodes] == [(0, None), (2, 0), (3, 2)]
    assert report.bytes_held <= report.budget
    with pytest.raises(StateError, match="node 1 was dropped to keep within the undo budget"):
        session.goto(1)
    assert np.array_equal(logits(session), refitted)
    session.undo()
    session.undo()
    assert np.array_equal(logits(session), base)
    assert session.redo().node == 2, "redo no longer leads to the one that was dropped"


def test_the_oldest_branch_goes_first_and_one_with_a_name_last(session):
    counts = (2, 4, 6)
    for count in counts:
        session.goto(0)
        session.prune(PruneOptions(n_prune=count, refit_experts=True))
        session.apply(ApplyOptions())
    session.goto(0)
    session.name_node(1, "the gentle one")
    held = {n.id: n.bytes for n in session.history().nodes}
    assert min(held[1], held[2], held[3]) > MIB
    drop(session, 5)  # from the second prune on, routers as sliced are held: a few KiB
    session.editor.history.budget = held[1] + held[3] + 100_000
    drop(session, 6)
    assert [n.id for n in session.history().nodes] == [0, 1, 3, 4, 5]
    session.editor.history.budget = held[1] + 100_000
    drop(session, 7)
    assert [n.id for n in session.history().nodes] == [0, 1, 4, 5, 6]
    session.goto(1)
    assert session.history().current == 1


def test_a_branch_goes_with_all_beyond_it(session):
    session.editor.history.budget = None
    session.prune(REFIT)
    session.apply(ApplyOptions())
    drop(session, 5)
    session.goto(0)
    drop(session, 5)
    session.editor.history.budget = MIB
    listener = Listener()
    session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (6,))))
    session.apply(ApplyOptions(), listener)
    assert [n.id for n in session.history().nodes] == [0, 3, 4]
    assert "node 1 (prune --n-prune 4 --refit-experts) with 1 beyond it is" in listener.said[0]
    for node in (1, 2):
        with pytest.raises(StateError, match=f"node {node} was dropped"):
            session.goto(node)


def test_a_refused_apply_leaves_the_side_that_was_live(session):
    session.editor.history.budget = 0
    drop(session, 5)
    session.prune(PruneOptions(n_prune=2, allow_stale=True))
    session.flip("base")
    before = logits(session)
    with pytest.raises(BudgetError, match=r"over the undo budget of 0 B"):
        session.apply(ApplyOptions())
    assert session.editor.side == "base"
    assert np.array_equal(logits(session), before)


@pytest.mark.parametrize("checks", [0, 1, 5, 6, 7, 11, 13, 20])
def test_a_cancelled_goto_ends_where_it_began(session, checks):
    nodes = [drop(session, expert) for expert in (0, 1, 2)]
    session.goto(0)
    other = drop(session, 7)
    here, state, answer = session.history().current, session.state, logits(session)
    with pytest.raises(Cancelled):
        session.goto(nodes[-1], CancelledAt(checks))
    assert (session.history().current, session.state) == (here, state)
    assert here == other
    assert np.array_equal(logits(session), answer)
    session.undo()
    assert session.redo().node == other, "redo leads where it did"
