"""What a pass that was broken off leaves is taken up by one like it, and by no other."""

from __future__ import annotations

import os
import time

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.data.datasets import Batch, batches
from mlxfun.hooks.progress import KEPT_DAYS, Progress, identity_of
from mlxfun.hooks.states import States

SEQUENCES = [np.arange(n, dtype=np.int32) for n in (5, 9, 3)]


def todo() -> list[Batch]:
    return batches(SEQUENCES, 18, 2)


def two_states() -> States:
    states = States()
    for number in range(2):
        states.put(number, mx.full((1, 3, 4), number + 0.5).astype(mx.bfloat16))
    return states


def test_states_and_what_was_seen_come_back(tmp_path) -> None:
    seen = [{0: [mx.arange(3)], 10: [mx.ones(2)], 2: [mx.zeros(2), mx.ones(2)]}, {}]
    Progress(tmp_path, "a").write(7, two_states(), seen)
    states, back = States(), [{}, {}]
    assert Progress(tmp_path, "a").read(states, back) == 7
    assert mx.array_equal(states.get(1), two_states().get(1))
    assert states.get(1).dtype == mx.bfloat16
    assert sorted(back[0]) == [0, 2, 10]
    assert [a.tolist() for a in back[0][2]] == [[0, 0], [1, 1]]
    assert back[1] == {}


def test_another_pass_a_damaged_one_and_none_begin_anew(tmp_path) -> None:
    progress = Progress(tmp_path, "a")
    assert progress.read(States(), [{}, {}]) == 0
    progress.write(7, two_states(), [{}, {}])
    assert Progress(tmp_path, "b").read(States(), [{}, {}]) == 0
    assert progress.read(States(), [{}, {}, {}]) == 0
    file = tmp_path / "pass-a" / "1.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert progress.read(States(), [{}, {}]) == 0
    progress.done()
    assert list(tmp_path.iterdir()) == []


def test_a_newer_state_of_a_pass_replaces_the_older(tmp_path) -> None:
    progress = Progress(tmp_path, "a")
    for layer in (3, 4):
        progress.write(layer, two_states(), [{}, {}])
    assert [place.name for place in tmp_path.iterdir()] == ["pass-a"]
    assert progress.read(States(), [{}, {}]) == 4


def test_what_is_old_is_removed(tmp_path) -> None:
    Progress(tmp_path, "old").write(3, two_states(), [{}, {}])
    Progress(tmp_path, "new").write(3, two_states(), [{}, {}])
    then = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(tmp_path / "pass-old", (then, then))
    Progress(tmp_path, "third").read(States(), [{}, {}])
    assert [place.name for place in tmp_path.iterdir()] == ["pass-new"]


@pytest.mark.parametrize("change", ["weights", "label", "tokens", "mask", "batches"])
def test_weights_purpose_and_batches_make_the_identity(change) -> None:
    weights, label, given = "state", "calibrating", todo()
    same = identity_of(weights, label, given)
    assert same == identity_of(weights, label, todo())
    if change == "weights":
        weights = "other"
    elif change == "label":
        label = "scanning"
    elif change == "tokens":
        given[0].tokens[0, 0] += 1
    elif change == "mask":
        given[0].mask[0, 0] = ~given[0].mask[0, 0]
    else:
        given = batches(SEQUENCES, 18, 1)
    assert identity_of(weights, label, given) != same
