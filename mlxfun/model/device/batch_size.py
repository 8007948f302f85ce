"""How many tokens one forward takes: what the device allows and what fits in the memory that is free.

A forward holds the outputs of the layers that are queued at a time. Their size is judged from the
shapes of the weights: each token has a value for each output of a matrix, and for each output of
the top-k of a stack of experts. A batch that turns out too large all the same is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Batch, Tokens, batches
from mlxfun.errors import BudgetError
from mlxfun.events import Notice
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.anatomy.layers import decoder_layers, in_order
from mlxfun.model.device.hints import announce
from mlxfun.model.device.memory import bound_cache, free_bytes, is_out_of_memory, on_cpu, on_cuda
from mlxfun.text import readable_bytes

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Result = TypeVar("Result")

CPU_BATCH = (2048, 4)
GPU_BATCH = (8192, 16)
"""(tokens, rows) of a batch. Measured: a CPU is fastest with 1 to 4 rows, a GPU wants many."""

CUDA_ROUTED_ROWS = 65_535
"""Tokens x top-k of a forward on CUDA: MLX lays them along a grid dimension of that size."""

FREE_SHARE = 0.8
"""Of what is free, the share that a batch may take: estimates are off by a few percent."""

LEAST_TOKENS = 64

HELD_LAYERS = 8
"""Measured on a 4-bit 30B model: a forward holds what five layers compute (the one that runs, the
one that is queued behind it, gates and products in between), eight where norms are taken of it."""


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Bounds of a batch. bytes_per_token: judged, of what a forward holds for each token."""

    tokens: int
    rows: int
    bytes_per_token: int

    def split(self, sequences: Sequence[Tokens]) -> list[Batch]:
        """The sequences in batches of this size."""
        return batches(list(sequences), self.tokens, self.rows)

    def summary(self, longest: int = 0) -> str:
        """As it is announced. longest: tokens of the longest sequence, a batch of its own where it
        is longer than a batch; the scores of its attention come on top."""
        if longest <= self.tokens:
            size = readable_bytes(self.tokens * self.bytes_per_token)
            return f"batches of {self.tokens:,} tokens, about {size}"
        size = readable_bytes(longest * self.bytes_per_token)
        return f"batches of {self.tokens:,} tokens, the longest of {longest:,}: {size} or more"


def batch_size(
    model: nn.Module, anatomy: MoEMap, tokens: int | None = None, rows: int | None = None
) -> BatchSize:
    """The size that suits the device, the model and what is free now; `tokens` and `rows` where
    they are given, within what the device allows."""
    default = CPU_BATCH if on_cpu() else GPU_BATCH
    each = bytes_per_token(model, anatomy)
    most = tokens or default[0]
    rows_at_once = routed_rows()
    if rows_at_once is not None and anatomy.layers:
        most = min(most, rows_at_once // anatomy.top_k)
    free = free_bytes()
    if tokens is None and free is not None:
        most = min(most, max(LEAST_TOKENS, int(FREE_SHARE * free) // max(each, 1)))
    bound_cache(most * each)
    return BatchSize(most, rows or default[1], each)


def routed_rows() -> int | None:
    """Tokens x top-k that the device takes at once, None for any number."""
    return CUDA_ROUTED_ROWS if on_cuda() else None


def bytes_per_token(model: nn.Module, anatomy: MoEMap) -> int:
    """Bytes that a forward without its head holds for each token: of HELD_LAYERS of its widest
    layers, as forwards over many tokens run one layer ahead (mlxfun.hooks.pace)."""
    modules = in_order(model)
    top_k = max(anatomy.top_k, 1)
    widest = max(
        (
            _layer_bytes(modules, f"{layer.path}.", top_k)
            for layer in decoder_layers(modules, anatomy)
        ),
        default=0,
    )
    return HELD_LAYERS * widest


def _layer_bytes(modules: Mapping[str, nn.Module], prefix: str, top_k: int) -> int:
    """Bytes of a token's values at the outputs of all matrices of a layer."""
    values, size = 0, 4
    for path, module in modules.items():
        weight = module.get("weight") if path.startswith(prefix) else None
        if not isinstance(weight, mx.array) or weight.ndim < 2:
            continue
        scales = module.get("scales")
        dtype = weight.dtype if scales is None else scales.dtype
        if mx.issubdtype(dtype, mx.floating):
            size = dtype.size
        values += weight.shape[-2] * (top_k if weight.ndim == 3 else 1)
    return values * size


def each_batch(
    todo: Sequence[Batch], work: Callable[[Batch], Result], ctx: Context = SILENT
) -> Iterator[tuple[Batch, Result]]:
    """`work` on each batch, in halves where memory does not suffice for the whole.

    Checks for a cancel before each. Raises BudgetError when a single row does not fit.
    """
    announce(ctx)
    most: int | None = None
    waiting = list(reversed(todo))
    while waiting:
        batch = waiting.pop()
        if most is not None and batch.tokens.size > most and len(batch.rows) > 1:
            waiting.extend(reversed(_halves(batch)))
            continue
        ctx.check()
        try:
            result = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        else:
            yield batch, result
            continue
        # Outside the handler, whose traceback keeps the arrays of the failed forward alive.
        mx.clear_cache()
        most = tell_halving(batch.tokens, said, ctx)
        waiting.append(batch)


def tell_halving(tokens: Array, said: str, ctx: Context) -> int:
    """Say that tokens [B, T] run in halves from now on; how many tokens a half has at most.

    said: what failed. Raises BudgetError for a single row.
    """
    if len(tokens) == 1:
        raise BudgetError(
            f"one sequence of {tokens.size:,} tokens does not fit in memory "
            f"({said[:100]}); lower --max-tokens"
        )
    most = tokens.size // 2
    ctx.emit(
        Notice(
            "warning",
            f"a batch of {tokens.size:,} tokens did not fit in memory; going on with "
            f"batches of at most {most:,}",
        )
    )
    return most


def _halves(batch: Batch) -> list[Batch]:
    """The first and the second half of the rows, as wide as their longest row."""
    middle = (len(batch.rows) + 1) // 2
    found = []
    for part in (slice(0, middle), slice(middle, None)):
        mask = batch.mask[part]
        width = int(mask.sum(axis=1).max())
        found.append(Batch(batch.tokens[part, :width], mask[:, :width], batch.rows[part]))
    return found
