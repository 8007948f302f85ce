"""Prunes and merges that go by a file of statistics; the smoke test's own prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.session.session import Session
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions

DATA = DatasetOptions("demo:mixed", max_samples=6, max_tokens=48)


@pytest.fixture
def session() -> Session:
    return Session.open("demo")


@pytest.fixture
def reversed_file(session: Session, tmp_path: Path) -> Path:
    """Statistics in which expert 0 is the busiest everywhere and expert 15 the least."""
    session.collect(CollectOptions(DATA))
    assert session._observations.stats is not None
    shape = session._observations.stats.shape
    scores = np.broadcast_to(np.arange(shape[1], 0, -1.0), shape).copy()
    made = replace(
        session._observations.stats,
        sums=dict.fromkeys(session._observations.stats.sums, scores * scores),
    )
    made.save(tmp_path / "s.npz")
    session.reset_stats()
    return tmp_path / "s.npz"


def test_a_prune_by_a_file_is_that_of_loading_it_first(
    session: Session, reversed_file: Path
) -> None:
    by_file = session.prune(PruneOptions(n_prune=4, metric="freq", saliency=reversed_file))
    assert set(by_file.pruned.values()) == {(12, 13, 14, 15)}
    assert session.stats().samples > 0
    session.load_stats(reversed_file)
    assert session.prune(PruneOptions(n_prune=4, metric="freq")).state_after == by_file.state_after


def test_a_prune_that_fails_leaves_the_statistics_in_hand(
    session: Session, reversed_file: Path
) -> None:
    session.collect(CollectOptions(DATA))
    before = session._observations.stats
    with pytest.raises((PlanError, UsageError)):
        session.prune(PruneOptions(n_prune=99, saliency=reversed_file))
    assert session._observations.stats is before


def test_a_merge_by_a_file_takes_its_centroids_and_weights_from_it(
    session: Session, reversed_file: Path
) -> None:
    options = MergeOptions(DATA, n_prune=4, metric="freq", saliency=reversed_file)
    report = session.merge(options)
    assert set(report.pruned.values()) == {(12, 13, 14, 15)}
    plan = session.editor.require_staged("look at").plan
    scores = RoutingStats.read(reversed_file).sums["freq"][0]
    for layer, groups in plan.groups.items():
        for members in groups.values():
            shares = [plan.weights[layer][e] for e in members]
            expected = scores[list(members)] / scores[list(members)].sum()
            assert shares == pytest.approx(expected)
    wide = session.merge(replace(options, model_wide=True))
    assert set(wide.pruned.values()) == {(12, 13, 14, 15)}


def test_a_merge_refuses_statistics_of_another_state(session: Session, reversed_file: Path) -> None:
    session.prune(PruneOptions(n_prune=2, saliency=reversed_file))
    session.apply(ApplyOptions())
    options = MergeOptions(DATA, n_prune=2, saliency=reversed_file)
    with pytest.raises(StateError, match="was made on state"):
        session.merge(options)
    session.merge(replace(options, allow_stale=True))


def test_a_smoke_test_answers_the_prompt_it_is_given(session: Session) -> None:
    short = session.smoke_test("pragma solidity ^0.8.0;", 3)
    longer = session.smoke_test("pragma solidity ^0.8.0;", 12)
    assert short.passed
    assert longer.text.startswith(short.text)
    assert len(longer.text) > len(short.text)
    with pytest.raises(UsageError, match="--prompt is empty"):
        session.smoke_test("  ")
