"""Fingerprints, and what is wrong with a damaged file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfun.checkpoint import headers, identity
from mlxfun.checkpoint.identity import (
    BLOCK_BYTES,
    EARLIER_BLOCKS,
    blocks,
    checkpoint_id,
    earlier_id,
    full_digest,
    is_earlier,
)
from mlxfun.context import Context
from mlxfun.data import demo
from mlxfun.errors import Cancelled, ModelError

META = "__metadata__"
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
    assert len(checkpoint_id(model)) == len("id2-") + 32
    assert earlier_id(model) == "248aa7811d9b0fae8175677fe6046da4"
    assert is_earlier(earlier_id(model))
    assert not is_earlier(checkpoint_id(model))
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
    between = header.data_start + BLOCK_BYTES + (room // (EARLIER_BLOCKS - 1) - BLOCK_BYTES) // 2
    before = earlier_id(model), full_digest(model), checkpoint_id(model)
    flip_byte(model / WEIGHTS, between)
    assert earlier_id(model) == before[0]
    assert full_digest(model) != before[1]
    # The tensor there is small, and small ones are hashed whole by now.
    assert checkpoint_id(model) != before[2]


def test_the_earlier_fingerprint_read_64_blocks_of_a_file_of_any_size(model: Path) -> None:
    header = headers.read_header(model / WEIGHTS)
    assert len(identity._earlier_offsets(header)) == EARLIER_BLOCKS
    huge = headers.Header(
        header.path, header.raw, header.data_start, 10**12, header.tensors, header.metadata
    )
    offsets = identity._earlier_offsets(huge)
    assert len(offsets) == EARLIER_BLOCKS
    assert offsets[0] == header.data_start
    assert offsets[-1] == 10**12 - BLOCK_BYTES


def test_a_change_of_any_small_tensor_changes_the_fingerprint(model: Path) -> None:
    header = headers.read_header(model / WEIGHTS)
    base, seen = checkpoint_id(model), {checkpoint_id(model)}
    small = [info for info in header.tensors.values() if info.nbytes <= 8192]
    routers = [info for name, info in header.tensors.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 6
    for info in (*small, *routers):
        flip_byte(model / WEIGHTS, info.start + info.nbytes // 2)
        seen.add(checkpoint_id(model))
        flip_byte(model / WEIGHTS, info.start + info.nbytes // 2)
    assert checkpoint_id(model) == base
    assert len(seen) == 1 + len({info.start for info in (*small, *routers)})


def test_of_a_large_stack_every_expert_is_read_and_of_a_matrix_every_part(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    experts, slab = 8, 512 << 10
    stack = mx.zeros((experts, 512, 256), mx.float32)
    mx.save_safetensors(str(model / "model-x.safetensors"), {"stack": stack})
    (info,) = headers.read_header(model / "model-x.safetensors").tensors.values()
    met = {(offset - info.start) // slab for offset, _ in blocks(info, whole=False)}
    assert met == set(range(experts))
    base = checkpoint_id(model)
    for expert in range(experts):
        changed = mx.concatenate(
            [stack[:expert], mx.ones((1, 512, 256)), stack[expert + 1 :]], axis=0
        )
        mx.save_safetensors(str(model / "model-x.safetensors"), {"stack": changed})
        assert checkpoint_id(model) != base, expert
    mx.save_safetensors(str(model / "model-x.safetensors"), {"stack": stack})
    assert checkpoint_id(model) == base
    matrix = headers.TensorInfo("F32", (4096, 4096), 0, 64 << 20)
    places = sorted(offset for offset, _ in blocks(matrix, whole=False))
    assert len(places) == 64
    assert [place >> 20 for place in places] == list(range(64))


def test_what_is_read_stays_bounded_whatever_the_size() -> None:
    def bytes_read(shape: tuple[int, ...], count: int) -> int:
        info = headers.TensorInfo("U8", shape, 0, count)
        return sum(size for _, size in blocks(info, whole=False))

    assert bytes_read((256, 7168, 2048), 256 * 7168 * 2048) == 256 * 4 * BLOCK_BYTES
    assert bytes_read((1 << 20, 1 << 20), 1 << 40) == 256 * BLOCK_BYTES
    assert bytes_read((1 << 20, 16, 3), 48 << 20) == 48 * BLOCK_BYTES


def settle(model: Path) -> None:
    """As if the files were written an hour ago."""
    for file in model.iterdir():
        then = file.stat().st_mtime_ns - 3600 * 10**9
        os.utime(file, ns=(then, then))


def test_a_fingerprint_is_made_once_and_anew_when_a_file_is_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "identities.json"
    settle(model)
    base = checkpoint_id(model, cache)
    counted: list[Path] = []
    real = identity.read_headers

    def counting(path: Path) -> list[headers.Header]:
        counted.append(path)
        return real(path)

    monkeypatch.setattr(identity, "read_headers", counting)
    assert checkpoint_id(model, cache) == base
    assert counted == []
    flip_byte(model / WEIGHTS, -1)
    settle(model)
    other = checkpoint_id(model, cache)
    assert other != base
    assert len(counted) == 1
    assert checkpoint_id(model, cache) == other
    assert len(counted) == 1
    for broken in ("", "[]", '{"version": "id2-", "checkpoints": 3}', '{"version": 1}'):
        cache.write_text(broken)
        assert checkpoint_id(model, cache) == other
    assert len(counted) == 5


def test_a_file_written_just_now_is_not_remembered(model: Path, tmp_path: Path) -> None:
    """Within the clock's resolution it may be written again and have the same time."""
    flip_byte(model / WEIGHTS, -1)
    checkpoint_id(model, tmp_path / "identities.json")
    assert not (tmp_path / "identities.json").exists()


def test_a_cache_that_cannot_be_written_is_done_without(model: Path, tmp_path: Path) -> None:
    settle(model)
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "identities.json", tmp_path):
        assert checkpoint_id(model, cache) == checkpoint_id(model)
    assert (tmp_path / "file").read_text() == ""


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


def disordered(path: Path, how: str) -> None:
    """Every entry is sound by itself, and the whole is not."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {name: entry for name, entry in header.items() if name != META}
    if how == "overlapping":
        # Of the same length, one tensor on the place of another.
        there = tensors["model.layers.0.input_layernorm.weight"]["data_offsets"]
        tensors["model.norm.weight"]["data_offsets"] = there
    elif how == "shifted":
        for entry in tensors.values():
            entry["data_offsets"] = [n + 2 for n in entry["data_offsets"]]
        body += b"\0\0"
    elif how == "a tensor less":
        del header["model.norm.weight"]
    elif how == "bytes behind the last tensor":
        body += b"\0" * 8
    raw = json.dumps(header).encode()
    if how == "repeated key":
        again = json.dumps({"model.norm.weight": tensors["model.norm.weight"] | {"dtype": "F16"}})
        raw = raw[:-1] + b", " + again.encode()[1:]
    elif how == "repeated field":
        raw = raw.replace(b'"dtype": "BF16"', b'"dtype": "F16", "dtype": "BF16"', 1)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("overlapping", r"corrupt: .* overlaps the tensors before it"),
        ("shifted", r"corrupt: .* begins at byte 2 and leaves a gap behind .* end at 0"),
        ("a tensor less", "corrupt: .*(leaves a gap|its tensors end at byte)"),
        ("repeated key", "corrupt: its header has 'model.norm.weight' twice"),
        ("repeated field", "corrupt: its header has 'dtype' twice"),
        ("bytes behind the last tensor", r"corrupt: its tensors end at byte [\d,]+ and the file"),
    ],
)
def test_tensors_must_fill_the_file_each_once(model: Path, how: str, message: str) -> None:
    disordered(model / WEIGHTS, how)
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
