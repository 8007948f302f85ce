"""Prunes that measure: what they need, what they refuse, and that they choose what measures best."""

from __future__ import annotations

from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from rigs import StopAt

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, PlanError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.prune import calibrated
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from tests.mlxfun import tiny_checkpoints
from tests.tiny_models import CONFIGS

MIXED = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=4, max_tokens=48),), kl=False)


@pytest.fixture(scope="module")
def shared():
    session = Session.open("demo")
    session.collect(MIXED)
    yield session
    session.close()


def logits(session) -> np.ndarray:
    return np.array(session.model(mx.array([[3, 14, 15, 9, 26, 5]])).astype(mx.float32))


def test_a_refitted_prune_is_applied_and_undone_bit_for_bit(session):
    base = logits(session)
    plan = session.prune(PruneOptions(n_prune=4, metric="output_error", refit_experts=True))
    assert plan.experts_after == 12
    assert plan.strategy == "bottom, refitted"
    assert plan.metric == "output_error"
    assert any("refitted" in warning for warning in plan.warnings)
    candidate = logits(session)
    session.flip("base")
    assert np.array_equal(logits(session), base)
    session.flip("candidate")
    assert session.apply(ApplyOptions()).state_after == plan.state_after
    assert np.array_equal(logits(session), candidate)
    session.undo()
    assert np.array_equal(logits(session), base)


@pytest.mark.slow
def test_the_refit_helps_where_it_was_not_looked_at(session):
    session.prune(PruneOptions(n_prune=6))
    plain = session.preview(EVAL).ratio
    session.prune(PruneOptions(n_prune=6, refit_experts=True))
    assert session.preview(EVAL).ratio < plain


def test_a_sequential_prune_is_the_plain_one_in_the_first_layer_only(session):
    plain = session.prune(PruneOptions(n_prune=4)).kept
    sequential = session.prune(PruneOptions(n_prune=4, sequential=True)).kept
    assert sequential[0] == plain[0]
    assert sequential != plain


def test_auto_takes_per_layer_what_moves_held_out_text_least(session, monkeypatch):
    # Only the measured figure counts: where freq is said to be best, its choice is taken.
    wanted = session.prune(PruneOptions(n_prune=4, metric="freq")).kept
    first = wanted[0]

    def measure(self):
        tap = session.editor.resident.layers[0]
        return 0.0 if tap.live == first else 1.0

    monkeypatch.setattr(calibrated.HeldOut, "__call__", measure)
    assert session.prune(PruneOptions(n_prune=4, metric="auto")).kept[0] == first


def test_the_held_out_measure_is_the_kl_that_a_preview_shows(session):
    with session.editor.live("base"):
        held_out = calibrated.HeldOut.of(session._workspace)
        assert held_out() == pytest.approx(0.0, abs=1e-5)
    session.prune(PruneOptions(n_prune=4))
    assert held_out() == pytest.approx(session.preview(EvaluateOptions()).kl_mean, rel=1e-3)


def test_what_measures_needs_the_text_of_a_collect():
    fresh = Session.open("demo")
    with pytest.raises(StateError, match="run `collect --dataset"):
        fresh.prune(PruneOptions(n_prune=4, metric="output_error"))
    fresh.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "best"}, "--metric best: choose one of freq"),
        ({"budget": "none"}, "--budget none: choose one of equal, global"),
        ({"metric": "output_error", "model_wide": True}, "leave out --model-wide"),
        ({"metric": "auto", "strategy": "strided"}, "leave out --model-wide and --strategy"),
        ({"sequential": True, "model_wide": True}, "leave out --sequential"),
        ({"metric": "output_error", "n_prune": None}, "say how many experts to prune"),
    ],
)
def test_options_that_contradict_are_refused(session, options, message):
    with pytest.raises(UsageError, match=message):
        session.prune(PruneOptions(**{"n_prune": 4, **options}))


def test_too_many_experts_are_refused_before_any_forward(session, monkeypatch):
    monkeypatch.setattr(calibrated.Recalibration, "run", None)
    with pytest.raises(PlanError, match="at most --n-prune 14 is possible"):
        session.prune(PruneOptions(n_prune=15, metric="output_error"))


def test_a_pass_that_does_not_fit_is_refused_with_the_figures(session, monkeypatch):
    staged = session.prune(PruneOptions(n_prune=2))
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: 1000)
    with pytest.raises(BudgetError, match="over the 1000 B there are"):
        session.prune(PruneOptions(n_prune=4, refit_experts=True))
    assert session.view().plan == staged


def test_a_cancelled_pass_keeps_the_plan_that_was_staged(session):
    staged = session.prune(PruneOptions(n_prune=2))
    before = logits(session)
    with pytest.raises(Cancelled):
        session.prune(PruneOptions(n_prune=4, refit_experts=True), StopAt(9))
    assert session.view().plan == staged
    assert np.array_equal(logits(session), before)


def test_what_an_applied_prune_left_can_be_pruned_by_output_error_again():
    fresh = Session.open("demo")
    fresh.collect(MIXED)
    first = fresh.prune(PruneOptions(n_prune=3)).pruned
    fresh.apply(ApplyOptions())
    fresh.collect(MIXED)
    plan = fresh.prune(PruneOptions(n_prune=2, metric="output_error", refit_experts=True))
    assert (plan.experts_before, plan.experts_after) == (13, 11)
    assert all(not set(gone) & set(first[layer]) for layer, gone in plan.pruned.items())
    fresh.close()


def test_experts_that_are_no_stack_are_pruned_layer_by_layer_and_refuse_the_rest_in_words(tmp_path):
    config = CONFIGS["dbrx"]
    path = tiny_checkpoints.write(tmp_path / "dbrx", {**config, "vocab_size": 4096})
    with closing(Session.open(path)) as session:
        session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=4, max_tokens=32)))
        for options in ({"metric": "output_error"}, {"refit_experts": True}):
            with pytest.raises(PlanError, match=r"\(dbrx\) are no stack of known projections"):
                session.prune(PruneOptions(n_prune=1, **options))
        plan = session.prune(PruneOptions(n_prune=1, sequential=True))
        assert {len(experts) for experts in plan.pruned.values()} == {1}


def test_statistics_without_a_token_rank_nobody():
    with closing(Session.open("demo")) as session:
        session._observations.stats = session._observations._empty_stats()
        with pytest.raises(StateError, match="hold no token at all: collect first"):
            session.prune(PruneOptions(n_prune=4))
        with pytest.raises(StateError, match="hold no token at all"):
            session.select(SelectOptions(n_prune=4))
        session.select(SelectOptions(drop={0: (1,)}))  # by hand needs no statistics
