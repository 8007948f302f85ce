"""Where an autoencoder's values come from: forwards of a model, or a file of activations.

Both are read in units (a sample, or neighbouring rows of a file), so that a training run can mix
them, hold some out, and take up again where it was without going through what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.checkpoint.headers import TensorInfo, read_header
from mlxfun.context import SILENT, Context
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import open_file
from mlxfun.tracing.activations import BATCH_TOKENS, batches
from mlxfun.tracing.names import Point
from mlxfun.tracing.prompts import padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved, SavedExpert

MADE_ON = ("state", "checkpoint", "steering")
"""What a file of activations says of its origin."""
PIECE = 256
"""Rows of a file that are read together."""


class Source(Protocol):
    """Values of one name. sizes: how many tokens each unit has, at most. skip: first tokens of a
    sample that are left out."""

    @property
    def at(self) -> str:
        """The canonical name."""

    @property
    def width(self) -> int:
        """D, values of a token."""

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each unit, at most."""

    @property
    def skip(self) -> int:
        """First tokens of each sample that are left out."""

    def read(self, units: Sequence[int], ctx: Context = SILENT) -> Array:
        """float32 [n, D]: the values of some units, in an order that only depends on them."""


class ModelSource:
    """Values of a model's forwards over samples, batch by batch: nothing is kept of them.

    Raises UsageError for a value that is no vector for each token, or where skip leaves nothing.
    """

    def __init__(
        self,
        model: Tracer,
        rows: Sequence[Sequence[int]],
        at: str,
        skip: int = 1,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._model, self._most = model, batch_tokens
        self._rows = [list(row) for row in rows]
        if not any(len(row) > skip for row in self._rows):
            raise UsageError(
                f"no sample has more than the {skip} tokens that are left out at its beginning"
            )
        self._point, self.skip = model.parts.names.point(at), skip
        self.width = vector_width(model, self._point)

    @property
    def at(self) -> str:
        """The canonical name."""
        return self._point.name

    @property
    def sizes(self) -> list[int]:
        """Tokens of each sample, less those that are left out."""
        return [max(0, len(row) - self.skip) for row in self._rows]

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of the samples."""
        return self._rows

    def read(self, units: Sequence[int], ctx: Context = SILENT) -> Array:
        """See Source."""
        return self.read_placed(units, ctx)[0]

    def read_placed(self, units: Sequence[int], ctx: Context = SILENT) -> tuple[Array, Array]:
        """float32 [n, D], and int [n, 2]: the sample (its place in `rows`) and position of each."""
        found, places = [np.zeros((0, self.width), np.float32)], [np.zeros((0, 2), np.int64)]
        rows = [self._rows[unit] for unit in units]
        for batch in batches(rows, self._most):
            ctx.check()
            one = _saved(self._point)
            run_once(self._model.parts, padded([rows[i] for i in batch]), [], [one])
            values, at = _of_tokens(one, [len(rows[i]) for i in batch])
            kept = at[:, 1] >= self.skip
            found.append(values[kept])
            numbers = np.array([units[i] for i in batch])
            places.append(np.stack([numbers[at[kept, 0]], at[kept, 1]], axis=1))
        return np.concatenate(found), np.concatenate(places)


def _saved(point: Point) -> Saved:
    return SavedExpert(point) if point.kind == "expert" else Saved(point)


def _of_tokens(one: Saved, lengths: Sequence[int]) -> tuple[Array, Array]:
    """float32 [n, D] of a batch's own tokens, and int [n, 2] of each: row of the batch, position."""
    values = np.array(one.value.astype(mx.float32))
    if isinstance(one, SavedExpert):
        return values, one.tokens
    row, at = np.nonzero(np.arange(values.shape[1]) < np.array(lengths)[:, None])
    return values[row, at], np.stack([row, at], axis=1)


def vector_width(model: Tracer, point: Point) -> int:
    """D of a value that is a vector for each token. Raises UsageError for any other."""
    one = _saved(point)
    run_once(model.parts, padded([[0, 0]]), [], [one], evaluate=False)
    shape, half = one.shape, one.dtype in (mx.bfloat16, mx.float16, mx.float32)
    wanted = 2 if point.kind == "expert" else 3
    if len(shape) != wanted or not half or point.attention is not None:
        raise UsageError(
            f"{point.name} is {one.described}, and no vector for each token: name a residual "
            "stream, an output of attention or feed-forward part, or one expert's output"
        )
    return int(shape[-1])


class FileSource:
    """Values that `batch_get_activations` (`activations save`) has written, read piece by piece.

    at: which of the file's values, needed where it has several. skip: taken from a file that has
    the positions of its rows. made_on: what the file says of its origin. Raises DatasetError for a file without such values.
    """

    def __init__(self, path: Path | str, at: str | None = None, skip: int = 1) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise DatasetError(f"{path} is no file; name one that activations save has written")
        header = read_header(self._path)
        tensors = header.tensors
        names = [name for name in tensors if name != "rows"]
        if at is None and len(names) != 1:
            raise UsageError(f"{path} has several values; name one: {', '.join(names[:8])}")
        self.at = at or names[0]
        if self.at not in names:
            raise UsageError(f"{path} has no {self.at}; it has {', '.join(names[:8])}")
        self._info = tensors[self.at]
        said = {k: v for k, v in header.metadata.items() if k in ("model_type", *MADE_ON)}
        self.made_on = {**said, "values": self._path.name}
        if self._info.dtype not in ("F32", "BF16", "F16") or len(self._info.shape) < 2:
            raise DatasetError(
                f"{path}: {self.at} is {self._info.dtype} {list(self._info.shape)}, and no vector "
                "for each row"
            )
        self.width = self._info.shape[-1]
        self._count = self._info.size // self.width
        self.skip = skip if "rows" in tensors else 0
        self._places = tensors.get("rows")

    @property
    def sizes(self) -> list[int]:
        """Rows of each piece."""
        starts = range(0, self._count, PIECE)
        return [min(PIECE, self._count - start) for start in starts]

    def read(self, units: Sequence[int], ctx: Context = SILENT) -> Array:
        """See Source."""
        found = [np.zeros((0, self.width), np.float32)]
        with open_file(self._path) as file:
            for unit in units:
                ctx.check()
                first = unit * PIECE
                count = min(PIECE, self._count - first)
                values = _read(file, self._info, first, count, self.width)
                if self._places is not None and self.skip:
                    at = _read(file, self._places, first, count, 2)[:, 1]
                    values = values[at >= self.skip]
                found.append(values)
        return np.concatenate(found)


def _read(file: BinaryIO, info: TensorInfo, first: int, count: int, width: int) -> Array:
    """Rows first..first + count of a tensor [.., width] as float32, or int32 as they are."""
    size = info.nbytes // info.size * width
    file.seek(info.start + first * size)
    data = file.read(count * size)
    if info.dtype == "BF16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(count, width)
    kind = {"F32": np.float32, "F16": np.float16, "I32": np.int32}[info.dtype]
    found = np.frombuffer(data, kind).reshape(count, width)
    return found if info.dtype == "I32" else found.astype(np.float32)
