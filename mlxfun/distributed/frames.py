"""Messages between the shell and its workers: a JSON object and named arrays. No pickles.

A frame is the length of its header (four bytes, big endian), the header (JSON; `arrays` lists
name, dtype and shape of each array) and the bytes of the arrays in that order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mlxfun.errors import StateError

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Kind = Literal[
    "alive", "hello", "joined", "become", "became", "job", "idle", "result", "stopped", "failed",
    "ended", "cancel", "quit",
]  # fmt: skip
"""What a message is. From the shell: become (these weights), job, cancel, quit. The others are a
worker's; idle, result, stopped and failed also go from rank to rank."""

KINDS: frozenset[Kind] = frozenset(get_args(Kind))
HEADER_BYTES = 64 << 20
"""The most that a header may have: lists of batches and experts are far below it."""
ARRAY_BYTES = 64 << 30
DTYPES = frozenset(
    ("bool", "uint8", "uint16", "uint32", "int8", "int32", "int64", "float16", "float32", "float64")
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. kind: what it is. data: JSON-able. arrays: by name."""

    kind: Kind
    data: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


def packed(frame: Frame) -> bytes:
    """The bytes of a frame."""
    arrays = {name: np.asarray(array, order="C") for name, array in frame.arrays.items()}
    head = {
        "kind": frame.kind,
        "data": frame.data,
        "arrays": [[name, a.dtype.name, list(a.shape)] for name, a in arrays.items()],
    }
    header = json.dumps(head).encode()
    return b"".join(
        [struct.pack(">I", len(header)), header, *(array.tobytes() for array in arrays.values())]
    )


def unpacked(stream: IO[bytes]) -> Frame | None:
    """The next frame of a stream, None at its end. Raises StateError for what is none."""
    start = stream.read(4)
    if not start:
        return None
    try:
        (length,) = struct.unpack(">I", start)
        if length > HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes")
        head = json.loads(_exactly(stream, length))
        kind, data, listed = head["kind"], head["data"], head["arrays"]
        arrays = {str(name): _array(stream, dtype, shape) for name, dtype, shape in listed}
        if kind not in KINDS or not isinstance(data, dict):
            raise ValueError(f"of kind {kind!r}")
    except (ValueError, KeyError, TypeError, struct.error, EOFError) as error:
        raise StateError(f"not a message of a worker ({error})") from error
    return Frame(kind, data, arrays)


def _array(stream: IO[bytes], dtype: Any, shape: Any) -> Array:
    if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array of {dtype!r} {shape!r}")
    kind = np.dtype(dtype)
    size = kind.itemsize
    for count in shape:
        size *= count
    if size > ARRAY_BYTES:
        raise ValueError(f"an array of {size:,} bytes")
    return np.frombuffer(_exactly(stream, size), dtype=kind).reshape(shape)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"it ended {size - len(data):,} bytes early")
    return data
