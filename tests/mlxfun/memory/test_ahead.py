"""Reading ahead finds a layer's part of the files, reads all of it, and stops when told to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlxfun.checkpoint.headers import read_headers
from mlxfun.memory.streaming import ahead
from mlxfun.memory.streaming.ahead import ReadAhead
from mlxfun.memory.streaming.unread import allow_open_files
from tests.mlxfun import tiny_checkpoints as tiny

LAYERS = ["model.layers.0", "model.layers.1", "model.layers.10"]


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny.write(tmp_path / "m", tiny.QWEN3 | {"num_hidden_layers": 11}, shards=3)


def test_the_bytes_of_a_layer_are_those_of_its_tensors_and_no_others(model) -> None:
    headers = read_headers(model)
    reading = ReadAhead(headers, LAYERS)
    for number, layer in enumerate(LAYERS):
        own = sum(
            info.nbytes for h in headers for name, info in h.tensors.items()
            if name.startswith(f"{layer}.")
        )  # fmt: skip
        # Ranges that are close together are read as one, so a little more may be read.
        assert own <= reading.bytes_of(number)
    reading.close()


def test_every_byte_is_read_once_and_a_request_that_is_out_of_date_is_dropped(
    model, monkeypatch
) -> None:
    monkeypatch.setattr(ahead, "NEAR", 0)
    monkeypatch.setattr(ahead, "CHUNK", 1000)
    headers, read = read_headers(model), []

    def count(_: int, parts: list[memoryview], place: int) -> int:
        read.append((place, len(parts[0])))
        return len(parts[0])

    monkeypatch.setattr(os, "preadv", count)
    reading = ReadAhead(headers, LAYERS)
    reading.want(1)
    expected = reading.bytes_of(1)
    deadline = time.monotonic() + 10
    while sum(size for _, size in read) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(size for _, size in read) == expected
    reading.want(99)  # beyond the last layer
    reading.close()
    reading.want(0)  # closed: nothing happens
    assert sum(size for _, size in read) == expected


def test_files_that_are_gone_are_left_to_the_reader(model) -> None:
    reading = ReadAhead(read_headers(model), LAYERS)
    for file in model.glob("*.safetensors"):
        file.unlink()
    reading._read(0)
    reading.close()


def test_as_many_files_may_be_open_as_two_openings_need() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (456, before[1])
        allow_open_files(1)  # never fewer than before
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 456
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
