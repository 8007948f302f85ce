"""The files that hold a model's weights, of bounded size each, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.checkpoint.headers import INDEX, write_file
from mlxfun.context import Context
from mlxfun.text import installed_version

if TYPE_CHECKING:
    from mlxfun.checkpoint.gate import Weights
    from mlxfun.checkpoint.replacing.unfinished import Ledger

DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.float32: "F32",
    mx.uint64: "U64", mx.int64: "I64", mx.complex64: "C64",
}  # fmt: skip
"""What headers call the types of MLX."""


def plan_shards(weights: Weights, limit: int) -> list[list[str]]:
    """Names per file: in order, each file within `limit` bytes unless one tensor exceeds it."""
    shards: list[list[str]] = []
    size = 0
    for name in weights.names:
        count = weights.nbytes(name)
        if not shards or size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def identity_of(weights: Weights, limit: int, made_of: str) -> str:
    """An identity of the bytes of all files; "" for unknown weights. made_of: an identity of the
    weights, and of what is done to them."""
    if not made_of:
        return ""
    digest = blake2b(digest_size=16)
    versions = [installed_version(package) for package in ("mlxfun", "mlx", "mlx-lm")]
    for text in (made_of, str(mx.default_device()), str(limit), *versions):
        digest.update(text.encode() + b"\0")
    for name in weights.names:
        digest.update(f"{name} {weights.dtype(name)} {weights.shape(name)}\0".encode())
    return digest.hexdigest()


def write_shards(
    directory: Path, weights: Weights, limit: int, ledger: Ledger, ctx: Context
) -> None:
    """Write the files that are not finished yet, and the index. Raises OSError and Cancelled."""
    shards = plan_shards(weights, limit)
    total = sum(weights.nbytes(name) for name in weights.names)
    index: dict[str, str] = {}
    done = 0

    def data(names: Sequence[str]) -> Iterator[memoryview]:
        nonlocal done
        for name in names:
            ctx.check()
            # Bytes of any type; an empty tensor has none to look at.
            flat = weights.tensor(name).reshape(-1)
            yield np.asarray(flat.view(mx.uint8) if flat.size else [], np.uint8).data
            done += weights.nbytes(name)
            ctx.progress("save", done, total, "B")

    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        index |= dict.fromkeys(names, file)
        if file in ledger.finished:
            done += sum(weights.nbytes(name) for name in names)
            continue
        said = {name: (DTYPES[weights.dtype(name)], weights.shape(name)) for name in names}
        write_file(directory / file, said, data(names), {"format": "mlx"})
        ledger.note(directory / file)
    document = {
        "metadata": {"total_size": total},
        "weight_map": {name: index[name] for name in sorted(index)},
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (directory / INDEX).write_text(text, encoding="utf-8")
