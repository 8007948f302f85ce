"""Whom a map protects: as long as the plan that was told so stands, and no longer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions

TEXT = DatasetOptions("demo:mixed", max_samples=6, max_tokens=48)
FOUR = SelectOptions(n_prune=4, clear=True)


@pytest.fixture(scope="module")
def shared():
    session = Session.open("demo")
    session.collect(CollectOptions(TEXT))
    yield session
    session.close()


@pytest.fixture
def least(session) -> list[int]:
    """The two experts of layer 0 that go first."""
    score = session.view().heat.metrics["reap_sum"][0]
    return sorted(int(e) for e in score.argsort()[:2])


@pytest.fixture
def spare(tmp_path: Path, least: list[int]) -> Path:
    """A safety map that protects those two."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({
        "num_layers": 6, "num_experts": 16, "safety_critical": {"0": least},
    }))  # fmt: skip
    return path


def protected(session) -> list[int]:
    return [int(e) for e in session.view().heat.protected[0].nonzero()[0]]


def test_a_discarded_plan_protects_nobody(session, least, spare) -> None:
    free = session.select(FOUR).pruned
    assert set(least) <= set(free[0])
    session.discard()
    session.prune(PruneOptions(n_prune=4, safety_map=spare))
    assert protected(session) == least
    session.discard()
    assert protected(session) == []
    assert session.select(SelectOptions(n_prune=4)).pruned == free


def test_a_staged_plan_protects_while_it_is_worked_on_by_hand(session, least, spare) -> None:
    session.prune(PruneOptions(n_prune=2, safety_map=spare))
    for change in (SelectOptions(drop={0: (15,)}), SelectOptions(even=True)):
        assert not set(session.select(change).pruned[0]) & set(least)
        assert protected(session) == least
    session.select(SelectOptions(n_prune=4))
    session.flip("base")
    assert protected(session) == least, "on either side"
    assert set(session.select(FOUR).pruned[0]) >= set(least), "--clear starts from nothing"
    assert protected(session) == []


def test_who_was_spared_when_a_plan_was_applied_stays_spared_until_it_is_undone(
    session, least, spare
) -> None:
    session.prune(PruneOptions(n_prune=2, safety_map=spare))
    session.apply(ApplyOptions())
    more = SelectOptions(n_prune=2, allow_stale=True)
    assert not set(session.select(more).pruned[0]) & set(least)
    session.discard()
    assert protected(session) == least
    session.undo()
    assert protected(session) == []
    session.redo()
    assert protected(session) == least


def test_the_newest_plan_decides_and_its_predecessor_is_back_when_it_goes(
    session, least, spare
) -> None:
    session.merge(MergeOptions(TEXT, n_prune=2, safety_map=spare))
    session.apply(ApplyOptions())
    assert protected(session) == least
    session.prune(PruneOptions(n_prune=2, allow_stale=True))
    assert protected(session) == []
    session.discard()
    assert protected(session) == least
