"""Reads and validates safetensors headers without reading any weights, and writes such files.

A file is an 8-byte little-endian header length N, N bytes of JSON, then the data, with
`data_offsets` counted from the end of the header. A download cut short or a Git LFS pointer is
recognised here, before minutes go into loading.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from mlxfun.errors import ModelError
from mlxfun.files import open_file, read_file

if TYPE_CHECKING:
    from mlxfun.arrays import Array

# Bits per element. A type that is not listed is left to MLX to judge.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"
_MANY = 8
_REMEDY = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header. start, end: absolute byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. raw: its JSON bytes as stored; data_start: offset of the first tensor."""

    path: Path
    raw: bytes
    data_start: int
    file_bytes: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and validate the header of one safetensors file.

    Raises ModelError naming the file, what is wrong and the remedy.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(_not_safetensors(path, prefix, size, length))
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: its header is not JSON; {_REMEDY}") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is corrupt: its header is not a JSON object; {_REMEDY}")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ModelError(f"{path} is corrupt: its metadata is no object of texts; {_REMEDY}")
    data_start = 8 + length
    tensors = {name: _entry(path, name, value, data_start) for name, value in entries.items()}
    needed = max((info.end for info in tensors.values()), default=data_start)
    if needed > size:
        raise ModelError(
            f"{path} is truncated: its header needs {needed:,} bytes and the file has {size:,}; "
            f"{_REMEDY}"
        )
    _require_filled(path, tensors, data_start, size)
    return Header(path, raw, data_start, size, tensors, metadata)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # One of two would be taken, and which is up to the reader.
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{path} is corrupt: its header has {twice[:200]!r} twice; {_REMEDY}")
    return found


def _require_filled(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The format knows no gaps, no overlaps and nothing behind the last tensor."""
    place = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != place:
            what = "overlaps" if info.start < place else "leaves a gap behind"
            raise ModelError(
                f"{path} is corrupt: {name[:200]!r} begins at byte {info.start - data_start:,} and "
                f"{what} the tensors before it, which end at {place - data_start:,}; {_REMEDY}"
            )
        place = info.end
    if place != size:
        raise ModelError(
            f"{path} is corrupt: its tensors end at byte {place:,} and the file has {size:,}; "
            f"{_REMEDY}"
        )


def require_even(headers: list[Header]) -> None:
    """Raise ModelError for a tensor of another type than its counterparts in other layers.

    Only types of the same size are compared, up to 16 bits: one that is taken for the other passes
    every check of shapes and is read as noise. Layers that are quantised differently have types of
    different sizes.
    """
    types: dict[tuple[str, int], dict[str, list[str]]] = {}
    for header in headers:
        for name, info in header.tensors.items():
            bits = DTYPE_BITS.get(info.dtype, 64)
            if bits > 16:
                continue
            like = re.sub(r"\d+", "#", name)
            for group in ((like, bits), ("", bits)):
                types.setdefault(group, {}).setdefault(info.dtype, []).append(name)
    # What is odd within its layers is better named so than as odd in the whole.
    for (like, _), found in sorted(types.items(), key=lambda item: not item[0][0]):
        odd, usual = (
            min(found, key=lambda t: len(found[t])),
            max(found, key=lambda t: len(found[t])),
        )
        # Over the whole checkpoint a few types side by side are usual, a single tensor is not.
        if odd != usual and (like or (len(found[odd]) == 1 and len(found[usual]) >= _MANY)):
            others = "its counterparts in other layers are" if like else "all others are"
            raise ModelError(f"{found[odd][0][:200]!r} is {odd} where {others} {usual}; {_REMEDY}")


def _not_safetensors(path: Path, prefix: bytes, size: int, length: int) -> str:
    if prefix == b"version ":
        return f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its directory"
    if size < 8:
        return f"{path} is truncated: {size} bytes cannot hold a safetensors header; {_REMEDY}"
    return (
        f"{path} is truncated or not a safetensors file: it announces a header of {length:,} "
        f"bytes and has {size:,} bytes in all; {_REMEDY}"
    )


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        begin, end = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} is corrupt: the header entry of {name!r} is malformed; {_REMEDY}"
        ) from error
    bits = DTYPE_BITS.get(dtype)
    expected = None if bits is None else math.prod(shape) * bits // 8
    if min(begin, *shape, 0) < 0 or end < begin or expected not in (None, end - begin):
        raise ModelError(
            f"{path} is corrupt: {name!r} is {dtype} {list(shape)} but occupies bytes "
            f"{begin} to {end}; {_REMEDY}"
        )
    return TensorInfo(dtype, shape, data_start + begin, data_start + end)


PACKED_METHODS = {"mxfp4", "mxfp8", "awq", "gptq", "compressed-tensors", "modelopt", "bitnet"}
"""Quantisations of other tools that stock loading leaves packed, or packs anew."""


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a model with this config.json stay packed when it is loaded."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return "quantization" in config or method in PACKED_METHODS


def times_held(dtype: str, packed: bool, cpu: bool) -> int:
    """How many times its bytes on disk a tensor takes in memory.

    8-bit floats that stock loading unpacks count double, and so do weights of 16 bits that will be
    cast for the CPU backend.
    """
    if packed:
        return 1
    unpacked = 2 if dtype.startswith("F8_E") else 1
    wide = 2 if cpu and dtype in ("BF16", "F16", "F8_E4M3", "F8_E5M2") else 1
    return unpacked * wide


def weight_files(directory: Path) -> list[Path]:
    """The files stock mlx-lm reads (`model*.safetensors`, whatever an index says), by name."""
    return sorted(directory.glob("model*.safetensors"))


def read_headers(directory: Path) -> list[Header]:
    """The checked headers of all weight files, after checking the index against them.

    Raises ModelError when there are no weights, a shard named by the index is missing, or a file
    is corrupt.
    """
    files = weight_files(directory)
    missing = sorted(indexed_files(directory) - {file.name for file in files})
    if missing:
        raise ModelError(
            f"{directory / INDEX} names {len(missing)} missing shard(s): {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; finish the download"
        )
    if not files:
        raise ModelError(_no_weights(directory))
    return [read_header(file) for file in files]


def indexed_files(directory: Path) -> set[str]:
    """File names in the index, empty without one. Raises ModelError when it is unreadable."""
    index = directory / INDEX
    if not index.exists():
        return set()
    try:
        files = set(json.loads(read_file(index))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not a safetensors index; {_REMEDY}") from error
    return {str(name) for name in files}


def _no_weights(directory: Path) -> str:
    others = sorted(
        file.name
        for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pth", "*.npz")
        for file in directory.glob(pattern)
    )
    found = f"it has {', '.join(others[:3])}" if others else "it has no weights at all"
    return (
        f"{directory} has no model*.safetensors files ({found}); "
        "convert the model with `mlx_lm.convert`"
    )


# -- writing ----------------------------------------------------------------------------------


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Iterable[memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, one tensor at a time: its bytes are asked for when the one before is written.

    tensors: {name: (dtype as in DTYPE_BITS, shape)}; data: the bytes of each. Raises OSError, and
    ValueError for bytes that are not as many as they should be.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # data begins at a multiple of 8
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in data:
            file.write(part)
            del part
        if (written := file.tell() - 8 - len(header)) != end:
            raise ValueError(f"{path}: {written:,} bytes of tensors that take {end:,}")


def read_tensors(path: Path, format_name: str) -> tuple[dict[str, Array], dict[str, str]]:
    """(arrays by name, metadata) of a file whose metadata names `format_name` as its "format".

    Of another file no array is read, and the dictionary of them is empty. Raises ModelError for a
    corrupt file.
    """
    read_header(path)
    with safe_open(str(path), framework="numpy") as file:
        said: dict[str, str] = file.metadata() or {}
        if said.get("format") != format_name:
            return {}, said
        return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118
