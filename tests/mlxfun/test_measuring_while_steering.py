"""What is observed of the weights is the same whether steering is in force or not, and says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.context import Context
from mlxfun.errors import Cancelled
from mlxfun.options import (
    BakeOptions,
    CollectOptions,
    DatasetOptions,
    GenerateOptions,
    PruneOptions,
    SteerOptions,
)
from mlxfun.stats import RoutingStats

MIXED = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
ADDED = replace(MIXED, data=DatasetOptions("demo:python", max_samples=2, max_tokens=48), add=True)
FORCED = SteerOptions(activate={0: (1, 2)}, deactivate={3: (4,)})
OFF = "; steering was off while calibrating (chat counts with it: `stats count on`)"


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
