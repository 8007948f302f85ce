"""A scan, from two data sets to a file that pruning protects by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, DatasetError, SaveError, StateError, UsageError
from mlxfun.scans import sample_routing
from mlxfun.scans.options import ScanOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun import tiny_checkpoints


def data(name: str, **options) -> DatasetOptions:
    return DatasetOptions(f"demo:{name}", max_tokens=32, **options)


@pytest.fixture(scope="module")
def shared():
    session = Session.open("demo")
    session.collect(CollectOptions(data("mixed", max_samples=6)))
    yield session
    session.close()


@pytest.fixture(scope="module")
def report(shared, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "safety_report.json"
    return shared.safety_scan(ScanOptions(data("python"), data("medical"), path))


def test_a_safety_scan_finds_experts_and_says_what_it_rests_on(report, session):
    document = json.loads(Path(report.path).read_text())
    assert report.samples == (42, 43)
    assert report.more
    assert report.less
    flagged = {(layer, e) for s in (report.more, report.less) for layer in s for e in s[layer]}
    assert {(row.layer, row.expert) for row in report.rows} == flagged
    strengths = [abs(row.composite) for row in report.rows]
    assert strengths == sorted(strengths, reverse=True)
    assert all(row.q <= 0.01 and row.stability >= 0.7 for row in report.rows)
    for row in report.rows:
        side = report.more if row.composite > 0 else report.less
        assert row.expert in side[row.layer]
    assert document["state"] == session.state
    assert document["model"] == session.checkpoint_id
    assert [s["name"] for s in document["sets"]] == ["demo:python", "demo:medical"]
    critical = {(int(k), e) for k, v in document["safety_critical"].items() for e in v}
    assert critical == flagged, "in the demo model positions are decoder layers"


def test_what_was_found_is_protected_at_once(report, session):
    without = session.prune(PruneOptions(n_prune=4))
    plan = session.prune(PruneOptions(n_prune=4, safety_map=Path(report.path)))
    flagged = {(row.layer, row.expert) for row in report.rows}
    assert flagged & {(ly, e) for ly, experts in without.pruned.items() for e in experts}
    assert not flagged & {(ly, e) for ly, experts in plan.pruned.items() for e in experts}


def test_a_set_against_itself_names_nobody(session, tmp_path):
    options = ScanOptions(data("mixed"), data("mixed"), tmp_path / "x.json")
    found = session.safety_scan(options)
    assert not found.rows
    assert found.by_percentile == 0
    assert json.loads((tmp_path / "x.json").read_text())["safety_critical"] == {
        str(position): [] for position in range(6)
    }


def test_steering_and_a_staged_plan_are_left_out_of_a_scan(session, report, tmp_path):
    options = ScanOptions(data("python"), data("medical"), tmp_path / "again.json")
    session.steer(SteerOptions(activate={0: (1,)}, deactivate={3: (2,)}))
    session.prune(PruneOptions(n_prune=4))
    again = session.safety_scan(options)
    assert (tmp_path / "again.json").read_text() == Path(report.path).read_text()
    assert again.notices[-1] == "the steering in force was left out of the scan"
    assert session.editor.side == "candidate"
    assert session.editor.steering.activate == {0: (1,)}


def test_a_domain_scan_writes_a_domain_report(session, tmp_path):
    path = tmp_path / "domain_report.json"
    options = ScanOptions(data("solidity"), data("mixed"), path, domain_name="solidity")
    found = session.domain_scan(options)
    document = json.loads(path.read_text())
    assert document["domain_name"] == "solidity"
    assert {int(k) for k, v in document["domain_experts"].items() if v} == set(found.more)
    assert found.summary().startswith("domain scan: ")
    assert "work more on solidity" in found.summary()
    with pytest.raises(UsageError, match="give --domain-name"):
        session.domain_scan(replace(options, domain_name=" "))


def test_layers_are_decoder_layers_in_the_report_and_positions_in_the_file(tmp_path):
    """deepseek_v3 with a dense first layer, its router's groups and bias; texts made to differ."""
    rng = np.random.default_rng(0)
    routers = {  # upstream starts them at zero, where every token is a tie
        f"model.layers.{layer}.mlp.gate.weight": mx.array(rng.normal(size=(8, 64)), mx.bfloat16)
        for layer in (1, 2)
    }
    model = tiny_checkpoints.write(tmp_path / "m", {
        **tiny_checkpoints.DEEPSEEK_V3, "num_hidden_layers": 3,
    }, extra=routers)  # fmt: skip
    for name, words in (("a", "alpha beta"), ("b", "1 2 3 4 5 { } ;")):
        lines = [json.dumps({"content": f"{words} {i} {words} {words}"}) for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    session = Session.open(model)
    assert session.anatomy.indices == (1, 2)
    sets = [DatasetOptions(str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    found = session.safety_scan(ScanOptions(*sets, tmp_path / "r.json", 75.0))
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["layer_indices"] == [1, 2]
    assert set(document["safety_critical"]) == {"0", "1"}
    assert found.more
    for layer, experts in found.more.items():
        assert document["hcdg_experts"][str(layer - 1)] == list(experts)
    session.collect(CollectOptions(sets[0]))
    options = PruneOptions(n_prune=2, safety_map=tmp_path / "r.json")
    plan = session.prune(options)
    for sets_ in (found.more, found.less):
        for layer, experts in sets_.items():
            assert not set(experts) & set(plan.pruned[layer])
    session.close()


def test_a_report_of_another_state_is_refused_by_prune_unless_asked_for(session, report):
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    session.collect(CollectOptions(data("mixed", max_samples=2)))
    options = PruneOptions(n_prune=2, safety_map=Path(report.path), allow_stale=True)
    with pytest.raises(StateError, match=f"was made on state {report.state}, the model is at"):
        session.prune(replace(options, allow_stale=False))
    plan = session.prune(options)
    assert any(f"made on state {report.state}" in warning for warning in plan.warnings)


def test_a_cancelled_scan_writes_nothing(session, tmp_path):
    class Stop(Context):
        def check(self) -> None:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        session.safety_scan(
            ScanOptions(data("harmful"), data("harmless"), tmp_path / "x.json"), Stop()
        )
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_refused_before_the_first_forward(session, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_routing, "scan", None)  # calling it would fail
    options = ScanOptions(data("harmful"), data("harmless"), tmp_path / "x.json")
    for changed, error, message in (
        (replace(options, output=tmp_path), SaveError, r"is a directory; name a file in it"),
        (replace(options, alpha=2.0), UsageError, "--alpha 2"),
        (replace(options, second=data("harmless", max_samples=3)), DatasetError,
         "3 samples of demo:harmless can be used"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            session.safety_scan(changed)


def test_few_samples_are_said_to_find_only_large_differences(session, tmp_path):
    few = [data(name, max_samples=8) for name in ("harmful", "harmless")]
    found = session.safety_scan(ScanOptions(*few, tmp_path / "x.json"))
    assert any(n.startswith("8 samples in a set find only large") for n in found.notices)
    np.testing.assert_array_equal(found.samples, (8, 8))
