"""Expert lists and maps in files, expert sets on command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxfun.data.expert_lists import (
    Maker,
    list_warning,
    read_expert_list,
    read_map,
    read_maps,
    write_expert_list,
)
from mlxfun.data.expert_notation import parse_expert_pairs, parse_experts
from mlxfun.errors import PlanError, SaveError, UsageError
from mlxfun.techniques.prune.options import PruneOptions

DENSE_FIRST = (1, 2, 3)  # a model whose layer 0 is dense


# --- command lines ---------------------------------------------------------------------------


def test_expert_sets_are_parsed_with_ranges_that_include_both_ends() -> None:
    assert parse_experts("0,1,250..255") == (0, 1, 250, 251, 252, 253, 254, 255)
    assert parse_experts(" 7 , 3..3, 7") == (3, 7)
    assert parse_expert_pairs("3:7,3:9,5:0..2") == {3: (7, 9), 5: (0, 1, 2)}
    assert parse_expert_pairs("5:1, 0:2 ,5:0") == {0: (2,), 5: (0, 1)}


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 99), st.sets(st.integers(0, 500), min_size=1), min_size=1))
def test_what_is_written_as_pairs_is_read_back(sets: dict[int, set[int]]) -> None:
    text = ",".join(f"{layer}:{e}" for layer in sets for e in sets[layer])
    assert parse_expert_pairs(text) == {k: tuple(sorted(v)) for k, v in sets.items()}


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1..", "..3", "1...3", "1.5", "٣", "1 2"])
def test_what_is_no_expert_number_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not an expert number or a range"):
        parse_experts(text)


@pytest.mark.parametrize("text", ["5..3", "0..999999999"])
def test_ranges_that_go_down_or_explode_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must go up"):
        parse_experts(text)


@pytest.mark.parametrize("text", ["3", "3-7", "x:1", ":1", "3:7,9"])
def test_what_is_no_pair_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not LAYER:EXPERT"):
        parse_expert_pairs(text)


# --- keep lists ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list.json", "list.csv"])
def test_a_keep_list_survives_the_round_trip_on_a_model_with_a_dense_first_layer(
    tmp_path: Path, name: str
) -> None:
    keep = {1: (0, 3), 2: (1, 2), 3: (2, 3)}
    write_expert_list(tmp_path / name, keep, 4)
    assert read_expert_list(tmp_path / name, DENSE_FIRST, 4) == keep


def test_the_written_list_has_positions_and_the_layers_they_stand_for(tmp_path: Path) -> None:
    write_expert_list(tmp_path / "a.json", {1: (0, 3), 3: (1, 2)}, 4)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "version": "1.0",
        "original_num_experts": 4,
        "keep_map": {"0": [0, 3], "1": [1, 2]},
        "layer_indices": [1, 3],
    }
    write_expert_list(tmp_path / "a.csv", {1: (0,)}, 2)
    assert (tmp_path / "a.csv").read_text() == (
        "layer,expert,action,layer_index\n0,0,keep,1\n0,1,prune,1\n"
    )


def document(tmp_path: Path, content: Any, name: str = "a.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_keys_of_the_ancestors_lists_are_positions(tmp_path: Path) -> None:
    entries = {"version": "1.0", "keep_map": {"0": [3, 0], "1": [1], "2": [2]}}
    path = document(tmp_path, entries)
    assert read_expert_list(path, DENSE_FIRST, 4) == {1: (0, 3), 2: (1,), 3: (2,)}


def test_keys_may_be_decoder_layers_where_the_file_lists_them(tmp_path: Path) -> None:
    entries = {"keep_map": {"1": [0], "2": [1], "3": [2]}, "layer_indices": [1, 2, 3]}
    path = document(tmp_path, entries)
    assert read_expert_list(path, DENSE_FIRST, 4) == {1: (0,), 2: (1,), 3: (2,)}
    with pytest.raises(PlanError, match="names the MoE layers 3, counted from 0; this model has 3"):
        read_expert_list(document(tmp_path, {"keep_map": entries["keep_map"]}), DENSE_FIRST, 4)


@pytest.mark.parametrize("stated", [3, 5, "4", 4.5, None, True, []])
def test_a_list_of_a_model_with_another_number_of_experts_is_refused(
    tmp_path: Path, stated: Any
) -> None:
    entries = {"original_num_experts": stated, "keep_map": {"0": [0, 1], "1": [1], "2": [0]}}
    with pytest.raises(PlanError) as refusal:
        read_expert_list(document(tmp_path, entries), DENSE_FIRST, 4)
    assert str(refusal.value) == (
        f"{tmp_path / 'a.json'} is for a model with {stated!r} experts per layer; this model has 4"
    )


def test_the_metadata_of_a_pruned_model_serves_as_a_list(tmp_path: Path) -> None:
    entries = {
        "original_num_experts": 4, "pruned_num_experts": 1, "metric": "reap_sum",
        "keep_map": {"1": [0], "2": [1], "3": [2]}, "layer_indices": [1, 2, 3],
    }  # fmt: skip
    path = document(tmp_path, entries)
    assert read_expert_list(path, DENSE_FIRST, 4) == {1: (0,), 2: (1,), 3: (2,)}


def test_a_csv_that_keeps_and_prunes_has_a_row_for_every_expert(tmp_path: Path) -> None:
    write_expert_list(tmp_path / "small.csv", {4: (0, 1), 5: (0, 1)}, 3)
    with pytest.raises(PlanError) as refusal:
        read_expert_list(tmp_path / "small.csv", (4, 5), 4)
    assert str(refusal.value) == (
        f"{tmp_path / 'small.csv'}: layer 4 keeps some experts and prunes others, and says nothing "
        "about 3; this model has 4, so the list may be of another"
    )


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_list_knows_its_model_and_says_when_it_is_another(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_expert_list(path, {4: (0, 1)}, 3, Maker("0123", "demo"))
    assert read_expert_list(path, (4,), 3) == {4: (0, 1)}
    assert list_warning(path, Maker("0123", "demo")) == ""
    shown = "demo (0123)" if name == "a.json" else "0123"
    assert list_warning(path, Maker("4567", "demo-4bit")) == (
        f"{path} was made on the model {shown}, this is demo-4bit (4567)"
    )
    write_expert_list(path, {4: (0, 1)}, 3)
    assert list_warning(path, Maker("4567", "demo-4bit")) == ""


def test_a_csv_of_prune_rows_alone_keeps_the_others(tmp_path: Path) -> None:
    path = document(
        tmp_path, "layer, expert, action\n0, 1, prune\n1, 0, Keep\n1, 2, keep\n", "a.csv"
    )
    assert read_expert_list(path, (4, 5), 3) == {4: (0, 2), 5: (0, 2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keep_map": {"0": [0], "1": [0]}}, "says nothing about the MoE layers 3"),
        ({"keep_map": {"0": [0], "1": [0], "2": [4]}}, r"layer 2 names unknown experts 4.*0\.\.3"),
        ({"keep_map": {"0": [0], "1": [0], "2": [-1]}}, "unknown experts -1"),
        ({"keep_map": {"0": [0], "1": [0], "2": [True]}}, "must have a list of expert numbers"),
        ({"keep_map": {"0": [0], "1": [0], "2": "3"}}, "must have a list of expert numbers"),
        ({"keep_map": {"0": [0], "1": [0], "x": [0]}}, "layer 'x' is not a number"),
        ({"keep_map": {"0": [0], "1": [0], "01": [0]}}, "names a layer twice"),
        ({"keep_map": {}, "layer_indices": [0, 1, 2]}, r"layers \[0, 1, 2\]; this model has"),
        ({"keep": {}}, "it has no keep_map"),
        ([1], "does not hold a JSON object"),
        ("{", "is not valid JSON"),
        ('{"keep_map": {"0": [0], "0": [1]}}', "has a key twice"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_expert_list(document(tmp_path, content), DENSE_FIRST, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layer,expert\n0,1\n", "needs the columns layer, expert and action"),
        ("layer,expert,action\n0,1,drop\n", r"a\.csv:2: action 'drop' is neither keep nor prune"),
        ("layer,expert,action\n0,9,keep\n", r"a\.csv:2: expert 9 is unknown"),
        ("layer,expert,action\n7,1,keep\n", r"a\.csv:2: MoE layer 7, counted from 0, is unknown"),
        ("layer,expert,action\n0,,keep\n", r"a\.csv:2: expert '' is not a number"),
        ("layer,expert,action\n0,1\n", r"a\.csv:2: action None is neither"),
        ("layer,expert,action\n0,1,keep\n0,1,prune\n", "layer 1 both keeps and prunes 1"),
        (
            "layer,expert,action,layer_index\n0,1,keep,0\n",
            "decoder layer 1 here, and 0 in the file",
        ),
    ],
)
def test_a_malformed_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_expert_list(document(tmp_path, content, "a.csv"), DENSE_FIRST, 4)


def test_unreadable_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read .*missing\.json: No such file"):
        read_expert_list(tmp_path / "missing.json", DENSE_FIRST, 4)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="is not UTF-8 text"):
        read_expert_list(tmp_path / "b.json", DENSE_FIRST, 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", '{"model_type": "qwen3_moe"}'), ("scores.csv", "name,score\nann,3\n")],
)
def test_a_list_is_not_written_over_a_file_of_another_kind(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SaveError, match="exists and is no expert list; choose another name"):
        write_expert_list(tmp_path / name, {0: (0,)}, 2)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_list_is_written_over_an_older_one_and_into_new_directories(
    tmp_path: Path, name: str
) -> None:
    for keep in ({4: (0, 1)}, {4: (1,)}):
        write_expert_list(tmp_path / "deep" / "er" / name, keep, 2)
        assert read_expert_list(tmp_path / "deep" / "er" / name, (4,), 2) == keep


# --- maps ------------------------------------------------------------------------------------

SAFETY: dict[str, Any] = {
    "num_layers": 3,
    "num_experts": 4,
    "safety_critical": {"0": [1, 2], "2": [0]},
}
DOMAIN: dict[str, Any] = {
    "num_layers": 3,
    "num_experts": 4,
    "domain_name": "solidity",
    "domain_experts": {"1": [3]},
}


def pairs(mask: Any) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in zip(*mask.nonzero(), strict=True)]


def test_a_map_marks_positions_not_decoder_layers(tmp_path: Path) -> None:
    path = document(tmp_path, SAFETY)
    mask = read_map(path, "safety_critical", DENSE_FIRST, 4)
    assert mask.shape == (3, 4)
    assert pairs(mask) == [(0, 1), (0, 2), (2, 0)]


@pytest.mark.parametrize(
    ("safety", "domain", "protect", "target"),
    [
        ("protect", "protect", [(0, 1), (0, 2), (1, 3), (2, 0)], []),
        ("protect", "target", [(0, 1), (0, 2), (2, 0)], [(1, 3)]),
        ("target", "target", [], [(0, 1), (0, 2), (1, 3), (2, 0)]),
    ],
)
def test_both_maps_are_united_each_in_its_mode(
    tmp_path: Path, safety: str, domain: str, protect: Any, target: Any
) -> None:
    options = PruneOptions(
        safety_map=document(tmp_path, SAFETY, "s.json"),
        safety_mode=safety,
        domain_map=document(tmp_path, DOMAIN, "d.json"),
        domain_mode=domain,
    )
    masks = read_maps(options, DENSE_FIRST, 4)
    assert (pairs(masks.protect), pairs(masks.target)) == (protect, target)
    assert masks.warnings == ()


def test_a_map_that_names_nobody_is_mentioned(tmp_path: Path) -> None:
    path = document(tmp_path, SAFETY | {"safety_critical": {"0": []}})
    masks = read_maps(PruneOptions(safety_map=path), DENSE_FIRST, 4)
    assert not masks.protect.any()
    assert "names no experts under safety_critical" in masks.warnings[0]


def test_no_maps_mean_no_marks() -> None:
    masks = read_maps(PruneOptions(), DENSE_FIRST, 4)
    assert not masks.protect.any()
    assert not masks.target.any()
    with pytest.raises(UsageError, match="mode 'shield'"):
        read_maps(PruneOptions(safety_mode="shield"), DENSE_FIRST, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SAFETY | {"num_layers": 2}, "has num_layers 2 and this model 3"),
        (SAFETY | {"num_experts": 8}, "has num_experts 8 and this model 4"),
        ({"safety_critical": {}}, "has num_layers None"),
        (SAFETY | {"safety_critical": [1]}, "has no table 'safety_critical'"),
        ({"num_layers": 3, "num_experts": 4}, "has no table 'safety_critical'"),
        (SAFETY | {"safety_critical": {"3": [0]}}, r"must be 0\.\.2, each once"),
        (SAFETY | {"safety_critical": {"1": [0], "01": [1]}}, "each once"),
        (SAFETY | {"safety_critical": {"L1": [0]}}, "layer 'L1' is not a number"),
        (SAFETY | {"safety_critical": {"1": [4]}}, "unknown experts 4"),
        (SAFETY | {"safety_critical": {"1": [1.0]}}, "must have a list of expert numbers"),
        (SAFETY | {"safety_critical": {"1": None}}, "must have a list of expert numbers"),
        (SAFETY | {"layer_indices": [0, 1, 2]}, "is for a model with MoE layers"),
        ('{"num_layers": 3, "num_experts": 4, "safety_critical": {"0": [1', "is not valid JSON"),
        (
            '{"num_layers": 3, "num_experts": 4, "safety_critical": {"0": [1], "0": []}}',
            "has a key twice",
        ),
    ],
)
def test_a_map_that_is_not_understood_in_full_stops_the_work(
    tmp_path: Path, content: Any, message: str
) -> None:
    options = PruneOptions(n_prune=1, safety_map=document(tmp_path, content))
    with pytest.raises(PlanError, match=message):
        read_maps(options, DENSE_FIRST, 4)


def test_a_missing_map_stops_the_work(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read .*gone\.json"):
        read_maps(PruneOptions(domain_map=tmp_path / "gone.json"), DENSE_FIRST, 4)
