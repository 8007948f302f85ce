"""Files that hold the identity of an earlier version are recognised, and said to be such."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.identity import earlier_id
from mlxfun.data import demo
from mlxfun.data.expert_lists import Maker, list_warning
from mlxfun.data.options import DatasetOptions
from mlxfun.data.scan_reports import Identity, require_current
from mlxfun.editing.earlier import present
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import ModelError, StateError
from mlxfun.model.identity import state_id
from mlxfun.session.session import Session
from mlxfun.techniques.prune.options import PruneOptions

OLD = "248aa7811d9b0fae8175677fe6046da4"
"""What the demo model was called by versions that looked at 64 blocks of its file."""


@pytest.fixture
def counted(session: Session) -> Session:
    if session._observations.stats is None:
        session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=4)))
    return session


def as_earlier(session: Session, path: Path, model: str = OLD) -> Path:
    """The statistics in hand as an earlier version would have saved them."""
    stats = session._observations.stats
    assert stats is not None
    replace(stats, model=model, state=state_id(model, {})).save(path)
    return path


def test_statistics_of_an_earlier_version_are_taken_and_named_so(
    counted: Session, tmp_path: Path
) -> None:
    report = counted.load_stats(as_earlier(counted, tmp_path / "old.npz"))
    assert report.earlier
    assert not report.stale
    assert "made with the identity of an earlier version" in report.summary()
    counted.save_stats(tmp_path / "new.npz")
    assert RoutingStats.read(tmp_path / "new.npz").model == counted.checkpoint_id
    assert not counted.load_stats(tmp_path / "new.npz").earlier


def test_those_of_another_model_are_still_refused(counted: Session, tmp_path: Path) -> None:
    other = as_earlier(counted, tmp_path / "other.npz", OLD[::-1])
    with pytest.raises(ModelError, match="was made on demo, not on demo"):
        counted.load_stats(other)


def test_states_are_known_by_their_earlier_names_after_an_edit_too(counted: Session) -> None:
    root = counted.state
    counted.prune(PruneOptions(n_prune=2))
    counted.apply(ApplyOptions())
    old = state_id(OLD, counted.editor.resident.ledger)
    assert counted.earlier_state(counted.state) == old
    now, path = present(counted.editor), Path("report.json")
    text = require_current(path, Identity(OLD, old), now, root, stale=False)
    assert "report.json was made with the identity of an earlier version" in text
    with pytest.raises(StateError, match=f"was made on state {root}, the model is at"):
        require_current(path, Identity(OLD, state_id(OLD, {})), now, root, stale=False)
    with pytest.raises(StateError, match="was made on the model 0123"):
        require_current(path, Identity("0123", old), now, root, stale=False)


def test_an_expert_list_of_an_earlier_version_is_of_this_model(
    session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"keep_map": {}, "model": OLD, "model_name": "demo"}))
    now = Maker(session.checkpoint_id, "demo")
    assert list_warning(path, now, session.editor.earlier.recognises) == ""
    assert "was made on the model demo" in list_warning(path, now)


def test_the_earlier_name_of_the_demo_is_computed_on_demand(session: Session) -> None:
    assert session.recognises(OLD)
    assert earlier_id(demo.model_path()) == OLD
    assert not session.recognises("")
    assert not session.recognises(session.checkpoint_id)
