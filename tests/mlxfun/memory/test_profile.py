"""Profiles of experts: ours, those of mlx-moe, and plain tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxfun.errors import PlanError
from mlxfun.memory.profile import Layers, read_profile, write_profile

SHAPE = Layers((1, 2, 4), 6)


def read(path: Path, document: Any) -> Any:
    path.write_text(json.dumps(document))
    return read_profile(path, SHAPE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((3, 6)).round(4)
    scores[1, 2] = 0
    path = tmp_path / "p.json"
    write_profile(path, SHAPE, scores, scores > 0.5, ("name", "id"))
    assert np.array_equal(read_profile(path, SHAPE), scores)
    layer = json.loads(path.read_text())["layers"]["4"]
    assert set(layer["universal"]) == set(np.flatnonzero(scores[2] > 0.5).tolist())
    ranked = [scores[2, e] for e in layer["universal"]]
    assert ranked == sorted(ranked, reverse=True)


def test_files_as_others_write_them(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    theirs = {"model": "x", "threshold": 0.5, "num_experts": 6, "layers": {
        "1": {"universal": [2, 5], "activation_counts": {"2": 22, "5": 14, "0": 1}},
        "2": {"universal": [3, 1], "activation_counts": {}}}}  # fmt: skip
    found = read(path, theirs)
    assert found[0].tolist() == [1, 0, 22, 0, 0, 14]
    assert found[1].tolist() == [0, 1, 0, 2, 0, 0]
    assert not found[2].any()
    lists = read(path, {"1": [4, 0], "4": [5]})
    assert lists[0].tolist() == [1, 0, 0, 0, 2, 0]
    assert lists[2, 5] == 1
    assert read(path, {"layers": {"2": {"3": 0.5}}})[1, 3] == 0.5


def test_layers_by_position_where_the_numbers_are_no_layers(tmp_path: Path) -> None:
    found = read(tmp_path / "p.json", {"0": [1], "1": [2], "2": [3]})
    assert [int(row.argmax()) for row in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"num_experts": 8, "layers": {"1": [0]}}, "8 experts a layer and this one has 6"),
        ({"layers": {"9": [0]}}, "names layer 9"),
        ({"layers": {"1": [6]}}, "names expert 6"),
        ({"layers": {"1": [True]}}, "names expert True"),
        ({"layers": {"1": {"0": -1}}}, "score of expert '0' is -1"),
        ({"layers": {"1": {"0": "many"}}}, "is 'many'"),
        ({"layers": {"one": [0]}}, "'one' is not a number"),
        ({"layers": {"1": 3}}, "neither a list"),
        ({"layers": {}}, "no table"),
        ({"layers": {"1": {"0": float("inf")}}}, "is inf"),
    ],
)
def test_files_that_cannot_be_used_are_named(document: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        read(tmp_path / "p.json", document)
    assert "p.json" in str(caught.value)
