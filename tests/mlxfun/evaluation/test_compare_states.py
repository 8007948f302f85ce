"""Two states of the history against each other, without moving."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, StateError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.prune.options import SelectOptions

EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=3, max_tokens=32),), samples=1,
                       sample_tokens=3)  # fmt: skip


@pytest.fixture(scope="module")
def session():
    """Node 1 lacks expert 0 everywhere, node 2 expert 1; the model is at 1."""
    session = Session.open("demo")
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48)))
    for expert in (0, 1):
        session.goto(0)
        session.select(SelectOptions(clear=True, drop=dict.fromkeys(range(6), (expert,))))
        session.apply(ApplyOptions())
    session.goto(1)
    yield session
    session.close()


def test_each_state_is_measured_as_if_it_were_there(session) -> None:
    report = session.compare_nodes(1, 2, EVAL)
    assert report.only_a == dict.fromkeys(range(6), (1,))
    assert report.only_b == dict.fromkeys(range(6), (0,))
    assert session.view().history.current == 1
    for figures in (report.a, report.b):
        session.goto(figures.node)
        alone = session.evaluate(EVAL)
        assert (figures.perplexity, figures.kl_mean) == (alone.perplexity["all"], alone.kl_mean)
        assert figures.samples == alone.samples
    session.goto(1)
    score = session.view().heat.metrics["reap_sum"]
    kept = sum(1 - row[0] / row.sum() for row in score) / 6
    assert report.a.work == pytest.approx(kept)
    whole = session.compare_nodes(0, 1, EVAL).a.bytes
    assert whole - report.a.bytes == sum(session.view().model.expert_bytes)


def test_redo_leads_where_it_did_before(session) -> None:
    session.goto(1)
    session.undo()
    session.compare_nodes(1, 2, EVAL)
    assert session.view().history.current == 0
    assert session.redo().node == 1


def test_a_comparison_that_is_cancelled_leaves_the_model_where_it_was(session) -> None:
    class Stop(Context):
        def check(self) -> None:
            raise Cancelled("cancelled")

    other = EvaluateOptions((DatasetOptions("demo:python", max_samples=2, max_tokens=24),))
    state = session.state
    with pytest.raises(Cancelled):
        session.compare_nodes(0, 2, other, Stop())
    assert (session.state, session.view().history.current) == (state, 1)


def test_nodes_that_are_not_there_and_staged_plans_are_named(session) -> None:
    with pytest.raises(StateError, match=r"there is no history node 9; they are 0\.\.2"):
        session.compare_nodes(0, 9, EVAL)
    with pytest.raises(StateError, match="there is no history node 9"):
        session.name_node(9, "x")
    assert session.view().history.current == 1
    session.select(SelectOptions(drop={0: (5,)}))
    with pytest.raises(StateError, match="before compare"):
        session.compare_nodes(0, 1, EVAL)
    session.discard()


def test_a_name_stays_with_its_state(session) -> None:
    session.name_node(2, "without 1")
    assert [n.label for n in session.view().history.nodes] == ["", "", "without 1"]
    session.name_node(2, "")
    assert session.history().nodes[2].label == ""
