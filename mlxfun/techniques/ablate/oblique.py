"""Oblique projections: each part loses what tells harmful prompts apart, and little else.

Of a part of the model (the attention or the feed-forward part of one layer) let y be the output and
v = mean of y over harmful prompts - mean of y over harmless ones, where the answer begins; of K
groups of harmful prompts V = [v_1 ... v_K]. With S the second moment of y over what is to stay as it
is, and mu the RIDGE times the mean of its diagonal,

    y' = y - s V U^T y,    U = (S + mu I)^-1 V (V^T (S + mu I)^-1 V)^-1

Since U^T V = I, s = 1 takes away the whole of V, as an orthogonal projection would; but of all U
that do, this one changes what is to stay the least (in the squares of y' - y, with the ridge). The
orthogonal projection has U = V, and also takes away what harmless text has along V. The idea is that
of least-squares concept erasure (N. Belrose et al., "LEACE", 2023) without its centring, which would
need a bias.

What is to stay: harmless prompts where the answer begins, tokens of harmless prompts, and tokens of
plain text, each kind with its share of S (SHARES).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.sampling import spread_of
from mlxfun.errors import ModelError, PlanError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward
from mlxfun.hooks.replay import intercepting
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.device.memory import free_bytes

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch, Tokens

SHARES = {"answers": 1.0, "prompts": 1.0, "text": 10.0}
RIDGE = 1e-3
LEAST_TOKENS = 4096
"""Of text that is looked at; twice the width of the stream where that is more."""
HELD_SHARE = 0.25
"""Of the memory that is free, what the outputs of parts that are looked at together may take."""


@dataclass(frozen=True, slots=True)
class Eraser:
    """What one part loses. write, read: float32 [K, D], V and U of the module's text."""

    write: Array
    read: Array


@dataclass(frozen=True, slots=True)
class Texts:
    """Token sequences, int32 [T] each: what is to go, in so many groups, and what is to stay."""

    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    plain: Sequence[Tokens] = ()
    groups: int = 1

    def picks(self, tokens: int) -> list[tuple[str, Tokens, Array]]:
        """(kind of its tokens, sequence, positions looked at), `tokens` of plain text at most."""
        found: list[tuple[str, Tokens, Array]] = []
        for kind, prompts in (("harmful", self.harmful), ("answers", self.harmless)):
            found += [(kind, prompt, np.array([len(prompt) - 1])) for prompt in prompts]
        for kind, sequences in (("prompts", self.harmless), ("text", self.plain)):
            found += [(kind, *picked) for picked in _spread(sequences, tokens)]
        return found


def _spread(sequences: Sequence[Tokens], tokens: int) -> Iterator[tuple[Tokens, Array]]:
    """`tokens` of all tokens at most, evenly spread: each sequence with its positions."""
    ends = np.cumsum([len(sequence) for sequence in sequences])
    if not len(ends):
        return
    chosen = spread_of(int(ends[-1]), tokens)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for sequence, end, part in zip(sequences, ends, parts, strict=True):
        if len(part):
            yield sequence, part - (end - len(sequence))


def erasers(
    model: nn.Module,
    anatomy: MoEMap,
    parts: Sequence[str],
    width: int,
    texts: Texts,
    ctx: Context = SILENT,
) -> dict[str, Eraser]:
    """{path of a part: what it loses}. parts: paths; width: D.

    One pass over the texts for as many parts as fit in memory together. Parts whose outputs do not
    differ between harmful and harmless prompts are left out. Raises Cancelled, and PlanError where
    no part differs.
    """
    picks = texts.picks(max(LEAST_TOKENS, 2 * width))
    kinds = np.repeat([kind for kind, _, _ in picks], [len(where) for *_, where in picks])
    free = free_bytes()
    room = len(parts) if free is None else int(HELD_SHARE * free) // (4 * len(kinds) * width)
    paths, step = list(parts), max(1, room)
    labels = np.zeros(len(texts.harmful), np.int64)
    if texts.groups > 1:
        # Where refusals have been found to form: beyond the middle.
        middle = paths[int(0.6 * len(paths))]
        rows = _outputs(model, anatomy, [middle], picks[: len(labels)], ctx)[middle]
        labels = _grouped(np.array(rows.astype(mx.float32)), texts.groups)
    found: dict[str, Eraser] = {}
    for start in range(0, len(paths), step):
        together = paths[start : start + step]
        for path, rows in _outputs(model, anatomy, together, picks, ctx).items():
            ctx.check()
            y = np.array(rows.astype(mx.float32))
            eraser = eraser_of({kind: y[kinds == kind] for kind in (*SHARES, "harmful")}, labels)
            if eraser is not None:
                found[path] = eraser
    if not found:
        raise PlanError(
            "harmful and harmless prompts do not differ in what any part of the model puts out; "
            "choose other prompts"
        )
    return found


def eraser_of(rows: Mapping[str, Array], labels: Array) -> Eraser | None:
    """What a part loses, None for nothing. rows: {kind: float [n, D]}; labels: int [n], the group
    of each harmful row.
    """
    kept = rows["answers"].mean(axis=0, dtype=np.float64)
    groups = [rows["harmful"][labels == label] for label in np.unique(labels)]
    v = np.stack([group.mean(axis=0, dtype=np.float64) - kept for group in groups])
    # Groups that differ from the harmless prompts in the same way count once.
    _, lengths, axes = np.linalg.svd(v, full_matrices=False)
    v = lengths[:, None] * axes
    v = v[lengths > 1e-4 * max(float(lengths[0]), 1e-30)]
    if not np.any(v):
        return None
    there = {kind: share for kind, share in SHARES.items() if len(rows[kind])}
    moment = np.zeros((v.shape[1], v.shape[1]))
    for kind, share in there.items():
        y = rows[kind].astype(np.float64)
        moment += share / sum(there.values()) / len(y) * (y.T @ y)
    diagonal = np.diag_indices(len(moment))
    moment[diagonal] += max(RIDGE * float(np.trace(moment)) / len(moment), 1e-30)
    u = np.linalg.solve(moment, v.T)
    read = np.linalg.solve(v @ u, u.T)
    return Eraser(v.astype(np.float32), read.astype(np.float32))


def _grouped(rows: Array, groups: int) -> Array:
    """The group of each harmful prompt, int [n], by k-means of a part's outputs [n, D]."""
    if len(rows) <= groups:
        return np.zeros(len(rows), np.int64)
    # Imported where it is used: SciPy would take a part of every start.
    from scipy.cluster.vq import kmeans2

    scaled = rows / max(float(rows.std()), 1e-30)
    labels: Array = kmeans2(scaled, groups, minit="++", rng=0)[1]
    return labels


def _outputs(
    model: nn.Module,
    anatomy: MoEMap,
    parts: Sequence[str],
    picks: Sequence[tuple[str, Tokens, Array]],
    ctx: Context,
) -> dict[str, mx.array]:
    """{part: its outputs [n, D] at the positions picked, in the order of picks}."""
    modules = dict(model.named_modules())
    watched = [modules[part] for part in parts]
    size = batch_size(model, anatomy)
    todo = size.split([sequence for _, sequence, _ in picks])
    found: dict[int, list[mx.array]] = {}
    done = 0

    def watch(batch: Batch) -> Watch[list[mx.array]]:
        return _watch(model, watched, batch, [picks[row][2] for row in batch.rows])

    order: list[int] = []
    for batch, seen in each_forward(model, anatomy, todo, watch, ctx, Task("reading prompts")):
        for number, rows in enumerate(seen):
            found.setdefault(number, []).append(rows)
        order += batch.rows
        done += len(batch.rows)
        ctx.progress("reading prompts", done, len(picks), "samples")
    lengths = [len(picks[row][2]) for row in order]
    starts = dict(zip(order, np.cumsum([0, *lengths[:-1]]), strict=True))
    sorted_rows = np.concatenate(
        [starts[row] + np.arange(len(where)) for row, (*_, where) in enumerate(picks)]
    )
    index = mx.array(sorted_rows.astype(np.uint32))
    return {part: mx.concatenate(found[number])[index] for number, part in enumerate(parts)}


def _watch(
    model: nn.Module, watched: Sequence[nn.Module], batch: Batch, picked: Sequence[Array]
) -> Watch[list[mx.array]]:
    """The outputs of the watched modules at the picked positions of one batch."""
    width = batch.tokens.shape[1]
    flat = np.concatenate([row * width + where for row, where in enumerate(picked)])
    index = mx.array(flat.astype(np.uint32))
    seen: dict[int, list[mx.array]] = {}

    def see(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = own(*args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        rows = y.reshape(-1, y.shape[-1])[index]
        mx.async_eval(rows)
        seen[number] = [rows]
        return out

    def run() -> list[mx.array]:
        mx.eval(model(mx.array(batch.tokens)))
        missing = len(watched) - len(seen)
        if missing:
            raise ModelError(
                f"the forward does not call {missing} of the {len(watched)} parts whose weights are "
                "to be edited, so what they put out cannot be read; please report the architecture"
            )
        rows = [seen[number][0] for number in range(len(watched))]
        mx.eval(rows)
        return rows

    return Watch(run, lambda: intercepting(watched, see), seen)
