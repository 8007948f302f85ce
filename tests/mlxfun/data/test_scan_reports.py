"""What a scan writes is read by pruning, by steering and by the family's other tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxfun import files
from mlxfun.data.expert_lists import read_maps
from mlxfun.data.scan_reports import Identity, read_report, require_current, write_report
from mlxfun.errors import PlanError, SaveError, StateError
from mlxfun.scans.contrast import Contrast
from mlxfun.techniques.prune.options import PruneOptions

LAYERS = (1, 2)
MORE = np.array([[True, False, False, False], [False, False, True, True]])
LESS = np.array([[False, True, False, False], [False, False, False, False]])


def contrast(risk: bool = True) -> Contrast:
    values = np.array([[1.0, -0.5, 0.0, 1 / 3], [0.0, -0.25, 0.5, 0.75]])
    return Contrast(
        differential_freq=values / 4, differential_activation=values / 8, composite=values,
        p=np.abs(values), q=np.abs(values), stability=np.abs(values), more=MORE, less=LESS,
        by_percentile=MORE | LESS, risk_difference=values / 2 if risk else None,
    )  # fmt: skip


def write(path: Path, kind: str = "safety", **about) -> dict:
    write_report(path, kind, contrast(), LAYERS, {"threshold_percentile": 90.0, **about})
    return json.loads(path.read_text())


def test_a_safety_report_has_the_familys_keys_with_layer_positions(tmp_path):
    document = write(tmp_path / "new" / "safety_report.json", model="m", state="s")
    assert document["num_layers"] == 2
    assert document["num_experts"] == 4
    assert document["threshold_percentile"] == 90.0
    assert document["hcdg_experts"] == {"0": [0], "1": [2, 3]}
    assert document["hrcg_experts"] == {"0": [1], "1": []}
    assert document["safety_critical"] == {"0": [0, 1], "1": [2, 3]}
    assert document["composite_score"] == [[1.0, -0.5, 0.0, 0.33333333], [0.0, -0.25, 0.5, 0.75]]
    assert document["differential_freq"][0][1] == -0.125
    assert document["differential_activation"][0][1] == -0.0625
    assert document["layer_indices"] == [1, 2]
    assert set(document["significance"]) == {"p", "q", "stability", "risk_difference"}
    assert document["significance"]["risk_difference"][1] == [0.0, -0.125, 0.25, 0.375]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["safety_report.json"]


def test_a_domain_report_names_domain_and_general_experts(tmp_path):
    document = write(tmp_path / "d.json", "domain", domain_name="solidity")
    assert document["domain_name"] == "solidity"
    assert document["domain_experts"] == {"0": [0], "1": [2, 3]}
    assert document["general_experts"] == {"0": [1], "1": []}
    assert "hcdg_experts" not in document
    assert "safety_critical" not in document


def test_pruning_reads_both_kinds_on_a_model_whose_first_layer_is_dense(tmp_path):
    write(tmp_path / "s.json")
    write(tmp_path / "d.json", "domain")
    options = PruneOptions(
        safety_map=tmp_path / "s.json", domain_map=tmp_path / "d.json", domain_mode="target"
    )
    masks = read_maps(options, LAYERS, 4)
    np.testing.assert_array_equal(masks.protect, MORE | LESS)
    np.testing.assert_array_equal(masks.target, MORE)


def test_steering_reads_back_what_was_written(tmp_path):
    write(tmp_path / "s.json", model="m", model_name="name", state="s")
    found = read_report(tmp_path / "s.json", "safety", LAYERS, 4)
    np.testing.assert_array_equal(found.more, MORE)
    np.testing.assert_array_equal(found.less, LESS)
    np.testing.assert_allclose(found.composite, contrast().composite, atol=1e-8)
    assert found.identity == Identity("m", "s", "name")


def test_a_report_of_another_tool_without_our_keys_is_read(tmp_path):
    document = write(tmp_path / "s.json")
    for key in ("layer_indices", "significance"):
        del document[key]
    (tmp_path / "old.json").write_text(json.dumps(document))
    found = read_report(tmp_path / "old.json", "safety", LAYERS, 4)
    np.testing.assert_array_equal(found.more, MORE)
    assert found.identity == Identity("", "")


def test_scores_of_mlx_fun_above_1_are_scaled_and_that_is_said(tmp_path):
    document = write(tmp_path / "s.json")
    for key in ("layer_indices", "significance"):
        del document[key]
    document["threshold_percentile"] = 90
    document["composite_score"] = [[0.5, -4.0, 0.0, 1.0], [2.0, 0.0, 0.0, -1.0]]
    (tmp_path / "old.json").write_text(json.dumps(document))
    found = read_report(tmp_path / "old.json", "safety", LAYERS, 4)
    np.testing.assert_allclose(
        found.composite, [[0.125, -1.0, 0.0, 0.25], [0.5, 0.0, 0.0, -0.25]], atol=1e-12
    )
    (notice,) = found.notices
    assert "composite scores up to 4, as mlx_fun writes them: they are divided by that" in notice
    document["composite_score"][0][0] = float("inf")
    (tmp_path / "old.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match="needs composite_score"):
        read_report(tmp_path / "old.json", "safety", LAYERS, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"composite_score": [[1.0]]}, "needs composite_score as 2 x 4 numbers"),
        ({"composite_score": "x"}, "needs composite_score"),
        ({"composite_score": [[float("nan")] * 4] * 2}, "needs composite_score"),
        ({"composite_score": [[1e308] * 4] * 2}, r"composite_score .* from -1 to 1"),
        ({"composite_score": [[-1.1] * 4] * 2}, r"composite_score .* from -1 to 1"),
        ({"composite_score": [[10**400] * 4] * 2}, "needs composite_score"),
        ({"composite_score": [["0.5"] * 4] * 2}, "needs composite_score"),
        ({"composite_score": [[True] * 4] * 2}, "needs composite_score"),
        ({"num_experts": 8}, "has num_experts 8 and this model 4"),
        ({"hcdg_experts": None}, "has no table 'hcdg_experts'"),
        ({"hrcg_experts": {"0": [4]}}, "names unknown experts 4"),
        ({"layer_indices": [0, 1]}, r"MoE layers \[0, 1\]; this model has \[1, 2\]"),
    ],
)
def test_a_report_that_is_not_understood_in_full_is_refused(tmp_path, change, message):
    document = write(tmp_path / "s.json") | change
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match=message):
        read_report(tmp_path / "bad.json", "safety", LAYERS, 4)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    write(path)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaveError, match=r"cannot write .*s\.json: No space left on device"):
        write_report(path, "safety", contrast(), LAYERS, {"state": "another"})
    assert path.read_text() == before


def test_a_report_is_not_written_over_a_file_of_another_kind(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(SaveError, match=r"config\.json exists and is no report of a scan"):
        write(path)
    assert path.read_text() == '{"model_type": "qwen3_moe"}'


NOW = Identity("m1", "s1", "model one")


def test_a_report_of_the_present_state_raises_nothing():
    assert require_current(Path("r"), Identity("m1", "s1"), NOW, "s0", stale=False) == ""
    assert require_current(Path("r"), Identity("", ""), NOW, "s1", stale=False) == ""


@pytest.mark.parametrize(
    ("made_on", "message"),
    [
        (Identity("m1", "s9"), "r was made on state s9, the model is at s1"),
        (Identity("", ""), "r was made on state s0, the model is at s1"),
        (Identity("m2", "s1", "two"), r"r was made on the model two \(m2\), this is model one"),
    ],
)
def test_a_stale_report_is_refused_naming_both_or_used_with_a_warning(made_on, message):
    with pytest.raises(StateError, match=message + ".*--allow-stale"):
        require_current(Path("r"), made_on, NOW, "s0", stale=False)
    warning = require_current(Path("r"), made_on, NOW, "s0", stale=True)
    assert "--allow-stale" not in warning
    assert "made on" in warning
