"""What is observed of the weights is the same whether steering is in force or not, and says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, StateError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions, RefusalOptions
from mlxfun.events import Notice
from mlxfun.generation.options import GenerateOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from mlxfun.techniques.router_bias.options import BakeOptions

MIXED = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
ADDED = replace(MIXED, data=DatasetOptions("demo:python", max_samples=2, max_tokens=48), add=True)
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=4, max_tokens=48),))
FORCED = SteerOptions(activate={0: (1, 2)}, deactivate={3: (4,)})
OFF = "; steering was off while calibrating (chat counts with it: `stats count on`)"


class Recorder(Context):
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event) -> None:
        if isinstance(event, Notice):
            self.said.append(event.text)


def scores(session: Session) -> dict[str, np.ndarray]:
    return {name: scores.copy() for name, scores in session.view().heat.metrics.items()}


# -- calibration ------------------------------------------------------------------------------


def test_calibrating_counts_what_the_weights_route_and_says_that_steering_was_off(session):
    plain = session.collect(MIXED)
    more = session.collect(ADDED)
    expected = scores(session)
    assert (expected["freq"][0] > 0).sum() > 2, "experts other than the two forced below work"
    session.steer(FORCED)
    told = [session.collect(MIXED), session.collect(ADDED)]
    for metric, score in scores(session).items():
        np.testing.assert_array_equal(score, expected[metric])
    assert [report.unseen for report in told] == [plain.unseen, more.unseen]
    assert [report.steering_off for report in (plain, more, *told)] == [False, False, True, True]
    assert OFF not in plain.summary()
    assert told[0].summary().endswith(OFF)
    assert session.view().steering.activated == {0: (1, 2)}, "it is in force again"
    assert not session.stats().steered


def test_a_cancelled_calibration_leaves_the_steering_in_force(session):
    class Stop(Context):
        def check(self) -> None:
            raise Cancelled("cancelled")

    session.steer(FORCED)
    assert session.collect(MIXED, Stop()).cancelled
    assert session.view().steering.activated == {0: (1, 2)}


def test_steering_that_is_staged_to_be_baked_is_off_as_well(session):
    session.collect(MIXED)
    expected = scores(session)
    session.steer(SteerOptions(deactivate={2: (14,)}))
    session.bake(BakeOptions(DatasetOptions("demo:mixed", max_samples=12, max_tokens=48)))
    assert session.collect(MIXED).steering_off, "it steers the committed side"
    np.testing.assert_array_equal(scores(session)["freq"], expected["freq"])
    session.flip("base")
    assert session.view().steering.deactivated == {2: (14,)}


def test_chat_is_counted_as_it_ran_and_flagged_where_that_was_steered(session, tmp_path):
    session.collect(MIXED)
    session.steer(FORCED)
    session.set_counting(True)
    before = scores(session)["freq"]
    session.chat("What is a kitchen?", GenerateOptions(max_tokens=3))
    grown = scores(session)["freq"] - before
    assert grown[0, 1] == grown[0, 2] == grown[0].sum() / 2, "the two forced experts served it all"
    told = session.save_stats(tmp_path / "chat.npz")
    assert told.steered
    assert "some of it from steered chat" in told.summary()
    file = RoutingStats.read(tmp_path / "chat.npz")
    assert file.steered
    plan = session.prune(PruneOptions(n_prune=2))
    assert any("counted while steering was in force" in warning for warning in plan.warnings)
    session.discard()
    session.collect(ADDED)
    assert session.stats().steered, "what was added to is still in there"
    session.collect(MIXED)
    assert not session.stats().steered
    assert session.prune(PruneOptions(n_prune=2)).warnings == ()


@pytest.mark.parametrize("flag", [None, True, False])
def test_files_say_whether_chat_was_steered_and_older_ones_need_not(session, tmp_path, flag):
    path = tmp_path / "stats.npz"
    session.collect(MIXED)
    session.save_stats(path)
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files if name != "steered"}
    np.savez(path, **arrays, **({} if flag is None else {"steered": np.bool_(flag)}))
    assert session.load_stats(path).steered is bool(flag)


# -- measuring --------------------------------------------------------------------------------


def test_a_steered_measurement_says_so_and_is_no_score_of_the_state(session):
    plain = session.evaluate(EVAL)
    scored = {"perplexity": plain.perplexity["all"], "kl_mean": 0.0}
    assert session.history().nodes[0].scores == scored
    session.steer(FORCED)
    steered = session.evaluate(EVAL)
    assert steered.perplexity["all"] > plain.perplexity["all"]
    assert steered.summary().startswith("current, while steering: perplexity ")
    assert plain.summary().startswith("current: perplexity ")
    assert session.history().nodes[0].scores == scored


def test_a_steered_preview_is_no_score_of_what_is_applied(session):
    session.steer(FORCED)
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0,))))
    steered = session.preview(EVAL)
    assert steered.summary().startswith("candidate, while steering: perplexity ")
    node = session.apply(ApplyOptions()).node
    assert session.history().nodes[node].scores == {}


def test_a_probe_says_that_it_was_made_while_steering(session):
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0,))))
    few = ProbeOptions(EVAL.datasets[0], 64)
    plain = session.probe(few)
    session.steer(FORCED)
    steered = session.probe(few)
    assert (plain.steered, steered.steered) == (False, True)
    assert plain.summary().startswith("probe: perplexity ")
    assert steered.summary().startswith("probe, while steering: perplexity ")
    assert steered.kl_mean > plain.kl_mean


def test_guardrails_judge_what_is_applied_without_the_steering(session):
    gone = SelectOptions(drop=dict.fromkeys(range(6), (0,)))
    session.select(gone)
    plain = session.preview(EVAL)
    session.discard()
    session.steer(FORCED)
    session.select(gone)
    steered = session.preview(EVAL)
    between = (plain.kl_mean + steered.kl_mean) / 2
    assert plain.kl_mean < between < steered.kl_mean
    told = Recorder()
    node = session.apply(ApplyOptions(max_kl=between), told).node
    assert told.said == [
        "the guardrails measure without steering, which is not part of what is applied"
    ]
    scored = {"perplexity": plain.perplexity["all"], "kl_mean": plain.kl_mean}
    assert session.history().nodes[node].scores == scored, "on the set that was previewed"
    assert session.view().steering.activated == {0: (1, 2)}


def test_guardrails_without_a_preview_refuse_with_the_figures_of_the_weights(session):
    session.collect(MIXED)
    session.prune(PruneOptions(n_prune=4))
    plain = session.preview(EvaluateOptions())
    session.discard()
    session.steer(FORCED)
    session.prune(PruneOptions(n_prune=4))
    with pytest.raises(StateError, match=f"mean KL {plain.kl_mean:.4f} is above --max-kl 0;"):
        session.apply(ApplyOptions(max_kl=0.0))
    assert session.view().scores == plain, "the figures that decided are those that are shown"
    assert session.view().steering.activated == {0: (1, 2)}


def test_steering_that_is_baked_is_measured_on_the_side_where_it_is_in_force(session):
    session.steer(SteerOptions(deactivate={2: (14,)}))
    session.bake(BakeOptions(DatasetOptions("demo:mixed", max_samples=12, max_tokens=48)))
    told = []
    for side in ("candidate", "base"):
        session.flip(side)
        told.append(session.preview(EVAL))
        assert (told[-1].steered, session.evaluate(EVAL).steered) == (False, True)
    assert told[0] == told[1]
    assert told[0].vs_current["kl_mean"] < told[0].kl_mean / 2, "beside the steering it replaces"
    assert session.history().nodes[0].scores.get("kl_mean", 0.0) == 0.0, "none of the steered one"


def test_states_are_compared_without_steering(session):
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0,))))
    node = session.apply(ApplyOptions()).node
    asked = replace(EVAL, samples=1, sample_tokens=4)
    plain = session.compare_nodes(0, node, asked)
    session.steer(FORCED)
    steered = session.compare_nodes(0, node, asked)
    assert steered == replace(plain, steering_off=True)
    assert steered.summary() == plain.summary() + "; steering was off for both"
    assert session.view().steering.activated == {0: (1, 2)}, "it is in force again"


def test_nothing_steers_in_the_middle_of_a_measurement(session):
    """A comparison has steering off, an evaluation reports what was in force from end to end."""
    expected = session.compare_nodes(0, 0, replace(EVAL, samples=2, sample_tokens=6))

    class Meddling(Context):
        def interlude(self) -> None:
            session.steer(FORCED)

    got = session.compare_nodes(0, 0, replace(EVAL, samples=2, sample_tokens=6), Meddling())
    assert got == expected
    assert not session.evaluate(replace(EVAL, samples=2, sample_tokens=6), Meddling()).steered
    assert session.view().steering.activated == {}


def test_refusals_that_are_counted_while_steering_say_on_which_side(session):
    asked = RefusalOptions(
        DatasetOptions("demo:harmful", max_samples=2),
        DatasetOptions("demo:harmless", max_samples=2),
        2,
    )
    assert session.refusals(asked).notices == ()
    session.steer(FORCED)
    assert session.refusals(asked).notices == ("counted while steering: current",)
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0,))))
    assert session.refusals(asked).notices == ("counted while steering: candidate and current",)
