"""Activations of many prompts: in memory, or streamed to a safetensors file.

Forwards run over batches of a bounded number of tokens, prompts of like length together, so what
is held at a time does not grow with the number of prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.errors import UsageError
from mlxfun.files import writing
from mlxfun.tracing.axes import Positions
from mlxfun.tracing.names import Point
from mlxfun.tracing.prompts import Prompts, encode, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved

BATCH_TOKENS = 4096
DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32",
          mx.int32: "I32"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Activations(Mapping[str, mx.array]):
    """{name: values}, one row for each prompt, or for each token where all positions were asked for.

    arrays: [N, ...] of a single position, [N, P, ...] of P of them, [tokens, ...] of all. rows: int
    [tokens, 2], prompt and position of each row where all positions were asked for, else None.
    """

    arrays: Mapping[str, mx.array]
    rows: Array | None = None

    def __getitem__(self, name: str | int) -> mx.array:
        """By name; a number is the residual stream that leaves that layer."""
        return self.arrays[f"layers.{name}.residual" if isinstance(name, int) else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@dataclass(frozen=True, slots=True)
class Work:
    """How many prompts are worked through. batch_tokens: padded tokens of a batch. made_on: what is
    said of the origin in a file that is written."""

    batch_tokens: int = BATCH_TOKENS
    ctx: Context = SILENT
    made_on: Mapping[str, str] = field(default_factory=dict)


Layers = Sequence[int] | Sequence[str]
"""Layers whose residual stream is wanted, by number; or names of values."""


def wanted_points(model: Tracer, layers: Layers | None) -> tuple[Point, ...]:
    """The points of names, the residual stream that leaves numbered layers, or that of all."""
    chosen = range(model.parts.names.layers) if layers is None else layers
    names = [f"layers.{one}.residual" if isinstance(one, int) else one for one in chosen]
    points = tuple(point for name in names for point in model.parts.names.several(name))
    for point in points:
        if point.kind == "expert" or point.attention is not None:
            raise UsageError(
                f"{point.name} has no row for each token of each prompt; save it in a trace"
            )
    return points


def batches(rows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Indices of rows in batches of at most `most` padded tokens (at least one row), by length."""
    if most < 1:
        raise UsageError(f"a batch of {most} tokens holds nothing; give at least 1")
    made: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if made and (len(made[-1]) + 1) * len(rows[index]) <= most:
            made[-1].append(index)
        else:
            made.append([index])
    return made


def _each_batch(
    model: Tracer,
    rows: Sequence[Sequence[int]],
    points: Sequence[Point],
    positions: Positions | None,
    work: Work,
) -> Iterator[tuple[list[int], list[mx.array]]]:
    """(indices of the prompts, one value [B, ...] for each point) of each batch, evaluated."""
    done = 0
    for batch in batches(rows, work.batch_tokens):
        work.ctx.check()
        saved = [Saved(point, positions) for point in points]
        run_once(model.parts, padded([rows[i] for i in batch]), [], saved)
        yield batch, [one.value for one in saved]
        done += len(batch)
        work.ctx.progress("activations", done, len(rows), "prompts")


def get_activations(
    model: Tracer,
    prompts: Prompts,
    layers: Layers | None = None,
    positions: Positions | None = -1,
    work: Work = Work(),
) -> Activations:
    """Values of every prompt, in memory. The dtype is the model's.

    layers: whose residual stream, all by default; or names, in which `*` and 2-5 stand for layers.
    positions: of each prompt, -1 (the default) its last token; None for all tokens.
    """
    rows = encode(model.parts.tokenizer, prompts, model.parts.map.vocabulary)
    points = wanted_points(model, layers)
    found: list[list[mx.array | None]] = [[None] * len(rows) for _ in points]
    for batch, values in _each_batch(model, rows, points, positions, work):
        for kept, value in zip(found, values, strict=True):
            for place, index in enumerate(batch):
                own = value[place]
                kept[index] = own if positions is not None else own[: len(rows[index])]
        # Views would keep the padded values of the whole batch alive.
        mx.eval([kept[index] for kept in found for index in batch])
    join = mx.stack if positions is not None else mx.concatenate
    made = {p.name: join([a for a in kept if a is not None])
            for p, kept in zip(points, found, strict=True)}  # fmt: skip
    mx.eval(made)
    return Activations(made, _token_rows(rows) if positions is None else None)


def _token_rows(rows: Sequence[Sequence[int]]) -> Array:
    pairs = [(index, at) for index, row in enumerate(rows) for at in range(len(row))]
    return np.array(pairs, np.int32)


@dataclass(frozen=True, slots=True)
class Saving:
    """What was written. rows: of each tensor; names: of the tensors."""

    path: Path
    names: tuple[str, ...]
    rows: int
    bytes: int


def batch_get_activations(
    model: Tracer,
    prompts: Prompts,
    path: Path | str,
    layers: Layers | None = None,
    positions: Positions | None = -1,
    work: Work = Work(),
) -> Saving:
    """`get_activations` to a safetensors file, batch by batch; memory holds one batch.

    The file has one tensor for each name, and "rows" int32 [tokens, 2] (prompt, position) where all
    positions were asked for.

    Raises SaveError where the file cannot be written; what was at `path` is then as it was.
    """
    rows = encode(model.parts.tokenizer, prompts, model.parts.map.vocabulary)
    points = wanted_points(model, layers)
    first = [0, *np.cumsum([len(row) if positions is None else 1 for row in rows]).tolist()]
    layout = _Layout(model, rows, points, positions, first[-1])
    said = {"format": "mlxfun activations", "model_type": model.parts.map.model_type,
            "positions": json.dumps(str(positions)), **work.made_on}  # fmt: skip
    with writing(Path(path)) as file:
        file.write(layout.header(said))
        for batch, values in _each_batch(model, rows, points, positions, work):
            for point, value in zip(points, values, strict=True):
                for place, index in enumerate(batch):
                    own = (
                        value[place] if positions is not None else value[place, : len(rows[index])]
                    )
                    file.seek(layout.offset(point.name, first[index]))
                    file.write(_bytes(own))
        if positions is None:
            file.seek(layout.offset("rows", 0))
            file.write(_token_rows(rows).tobytes())
        size = layout.end
    return Saving(Path(path), tuple(point.name for point in points), first[-1], size)


def _bytes(value: mx.array) -> bytes:
    half = value.dtype in (mx.bfloat16, mx.float16)
    return np.ascontiguousarray(np.array(value.view(mx.uint16) if half else value)).tobytes()


class _Layout:
    """Where each tensor's rows are in a safetensors file."""

    def __init__(
        self,
        model: Tracer,
        rows: Sequence[Sequence[int]],
        points: Sequence[Point],
        positions: Positions | None,
        count: int,
    ) -> None:
        saved = [Saved(point, positions) for point in points]
        run_once(model.parts, padded([min(rows, key=len)]), [], saved, evaluate=False)
        skip = 2 if positions is None else 1
        self._shapes = {
            one.name: (DTYPES[one.dtype], (count, *one.shape[skip:]), one.dtype.size)
            for one in saved
        }
        if positions is None:
            self._shapes["rows"] = ("I32", (count, 2), 4)
        self._count = count
        self._data = 0
        self._starts: dict[str, int] = {}
        self.end = 0
        for name, (_, shape, size) in self._shapes.items():
            self._starts[name] = self.end
            self.end += math.prod(shape) * size

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The file's beginning."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, (dtype, shape, size) in self._shapes.items():
            start = self._starts[name]
            entries[name] = {"dtype": dtype, "shape": shape,
                             "data_offsets": [start, start + math.prod(shape) * size]}  # fmt: skip
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        return len(text).to_bytes(8, "little") + text

    def offset(self, name: str, row: int) -> int:
        """Where a row begins in the file."""
        _, shape, size = self._shapes[name]
        return self._data + self._starts[name] + row * math.prod(shape[1:]) * size


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model would say after a prompt. tokens: (id, text, probability), best first."""

    prompt: tuple[int, ...]
    tokens: tuple[tuple[int, str, float], ...]


def run_prompts(
    model: Tracer,
    prompts: Prompts,
    top_k: int = 10,
    work: Work = Work(),
) -> list[Prediction]:
    """The most probable next tokens of every prompt, in the order of the prompts."""
    rows = encode(model.parts.tokenizer, prompts, model.parts.map.vocabulary)
    found: list[Prediction | None] = [None] * len(rows)
    output = [model.parts.names.point("output")]
    for batch, (logits,) in _each_batch(model, rows, output, -1, work):
        chances = mx.softmax(logits.astype(mx.float32), axis=-1)
        best = mx.argsort(-chances, axis=-1)[:, :top_k]
        values = np.array(mx.take_along_axis(chances, best, axis=-1))
        for place, index in enumerate(batch):
            ids = np.array(best[place]).tolist()
            words = [model.parts.tokenizer.decode([i]) for i in ids]
            tokens = tuple(zip(ids, words, values[place].tolist(), strict=True))
            found[index] = Prediction(tuple(rows[index]), tokens)
    return [one for one in found if one is not None]
