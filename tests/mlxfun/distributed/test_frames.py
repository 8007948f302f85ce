"""Messages between shell and workers: whole, or refused; never code."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest

from mlxfun.distributed.frames import Frame, packed, unpacked
from mlxfun.errors import StateError


def test_a_frame_comes_back_as_it_was() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.int64),
        "one": np.array(True),
    }
    stream = io.BytesIO(
        packed(Frame("hello", {"n": [1, "ü", None]}, arrays)) + packed(Frame("joined"))
    )
    first, second, third = (unpacked(stream) for _ in range(3))
    assert first is not None
    assert (first.kind, first.data) == ("hello", {"n": [1, "ü", None]})
    for name, array in arrays.items():
        assert first.arrays[name].dtype == array.dtype
        assert np.array_equal(first.arrays[name], array)
    assert second == Frame("joined")
    assert third is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x09not json!",
        b"\0\0\0\x02[]",
        b"\0\0",
        packed(Frame("hello", {}, {"a": np.zeros(9)}))[:-1],
        pickle.dumps({"kind": "x"}),
        packed(Frame("hello")).replace(b'"arrays": []', b'"arrays": 5 '),
        packed(Frame("hello")).replace(b"hello", b"hallo"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(StateError, match="not a message of a worker"):
        unpacked(io.BytesIO(data))


@pytest.mark.parametrize("entry", [["a", "object", [1]], ["a", "float32", [-1]], ["a", "V8", [2]],
                                   ["a", "uint8", [1 << 40]]])  # fmt: skip
def test_arrays_of_other_kinds_and_sizes_are_refused(entry: Any) -> None:
    head = packed(Frame("hello"))[4:].replace(b"[]", json.dumps([entry]).encode())
    with pytest.raises(StateError, match="an array of"):
        unpacked(io.BytesIO(len(head).to_bytes(4, "big") + head))
