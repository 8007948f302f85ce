"""Fingerprints, and what is wrong with a damaged file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfun.checkpoint import headers
from mlxfun.checkpoint.identity import BLOCK_BYTES, BLOCKS, checkpoint_id, full_digest
from mlxfun.context import Context
from mlxfun.data import demo
from mlxfun.errors import Cancelled, ModelError

WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(demo.model_path(), tmp_path / "model")
    return tmp_path / "model"


def flip_byte(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_copy_and_a_reformatted_config_have_the_same_fingerprint(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    assert checkpoint_id(model) == checkpoint_id(demo.model_path())
    assert full_digest(model) == full_digest(demo.model_path())
    assert len(checkpoint_id(model)) == 32
    assert checkpoint_id(model) != full_digest(model)


def test_config_header_and_sampled_bytes_all_count(model: Path) -> None:
    base = checkpoint_id(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 3}))
    assert checkpoint_id(model) != base
    (model / "config.json").write_text(json.dumps(config))
    assert checkpoint_id(model) == base
    flip_byte(model / WEIGHTS, -1)
    assert checkpoint_id(model) != base
    flip_byte(model / WEIGHTS, -1)
    assert checkpoint_id(model) == base


def test_the_full_digest_sees_a_byte_that_sampling_misses(model: Path) -> None:
    header = headers.read_header(model / WEIGHTS)
    room = header.file_bytes - header.data_start - BLOCK_BYTES
    between = header.data_start + BLOCK_BYTES + (room // (BLOCKS - 1) - BLOCK_BYTES) // 2
    before = checkpoint_id(model), full_digest(model)
    flip_byte(model / WEIGHTS, between)
    assert checkpoint_id(model) == before[0]
    assert full_digest(model) != before[1]


def test_a_file_of_any_size_costs_the_same_number_of_bytes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.checkpoint import identity

    header = headers.read_header(model / WEIGHTS)
    assert len(identity._sample_offsets(header)) == BLOCKS
    huge = headers.Header(
        header.path, header.raw, header.data_start, 10**12, header.tensors, header.metadata
    )
    offsets = identity._sample_offsets(huge)
    assert len(offsets) == BLOCKS
    assert offsets[0] == header.data_start
    assert offsets[-1] == 10**12 - BLOCK_BYTES


def test_the_full_digest_reports_progress_and_can_be_cancelled(model: Path) -> None:
    class Watch(Context):
        seen: tuple[int, int | None] = (0, None)
        stop = False

        def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
            self.seen = (done, total)

        def check(self) -> None:
            if self.stop:
                raise Cancelled("cancelled")

    watch = Watch()
    full_digest(model, watch)
    header = headers.read_header(model / WEIGHTS)
    assert watch.seen == (header.file_bytes - header.data_start, header.file_bytes)
    watch.stop = True
    with pytest.raises(Cancelled):
        full_digest(model, watch)


def test_headers_agree_with_what_mlx_loads(model: Path) -> None:
    header = headers.read_header(model / WEIGHTS)
    arrays = mx.load(str(model / WEIGHTS))
    assert {n: t.shape for n, t in header.tensors.items()} == {
        n: tuple(a.shape) for n, a in arrays.items()
    }
    assert sum(t.nbytes for t in header.tensors.values()) == 6_385_664


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if how == "cut short":
        data = data[:-1000]
    elif how == "cut in the header":
        data = data[:500]
    elif how == "nearly empty":
        data = data[:5]
    elif how == "not json":
        data = data[:8] + b"\xff" + data[9:]
    elif how == "git lfs pointer":
        data = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    elif how == "impossible header length":
        data = b"\xff" * 8 + data[8:]
    else:
        entry = header["model.norm.weight"]
        if how == "wrong shape":
            entry["shape"] = [129]
        elif how == "negative offset":
            entry["data_offsets"] = [-8, 248]
        elif how == "no dtype":
            del entry["dtype"]
        raw = json.dumps(header).encode()
        data = len(raw).to_bytes(8, "little") + raw + data[8 + length :]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", r"truncated: its header needs [\d,]+ bytes and the file has [\d,]+"),
        ("cut in the header", r"announces a header of [\d,]+ bytes and has 500 bytes in all"),
        ("nearly empty", "truncated: 5 bytes cannot hold a safetensors header"),
        ("not json", "corrupt: its header is not JSON"),
        ("git lfs pointer", "a Git LFS pointer.*git lfs pull"),
        ("impossible header length", "announces a header of 18,446,744,073,709,551,615"),
        ("wrong shape", r"corrupt: 'model.norm.weight' is BF16 \[129\] but occupies"),
        ("negative offset", "corrupt: 'model.norm.weight' is BF16"),
        ("no dtype", "corrupt: the header entry of 'model.norm.weight' is malformed"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(model: Path, how: str, message: str) -> None:
    damaged(model / WEIGHTS, how)
    with pytest.raises(ModelError, match=f"{WEIGHTS} .*{message}"):
        checkpoint_id(model)


def test_an_index_that_names_missing_shards_lists_them(model: Path) -> None:
    index = model / headers.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"names 1 missing shard\(s\): model-00002-of-00002"):
        checkpoint_id(model)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not a safetensors index"):
        checkpoint_id(model)


def test_a_directory_with_other_weights_says_what_it_has(model: Path) -> None:
    (model / headers.INDEX).unlink()
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"it has pytorch_model\.bin.*mlx_lm\.convert"):
        checkpoint_id(model)
