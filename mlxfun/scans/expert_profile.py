"""The profile of one expert: tokens it serves most, and its nearest neighbour in the layer.

Both are looked at on the committed weights without steering, on the beginning of a data set. A
token's share is how many of its occurrences the expert served; rare tokens say nothing, so a token
has to occur a few times. Alikeness is that of merging (mlxfun.model.expert_similarity): how alike two
experts' mean outputs are, and the router's logits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.context import Context
from mlxfun.errors import PlanError
from mlxfun.hooks.routing import LayerTap, Record, Taps
from mlxfun.model.expert_similarity import mean_outputs, similarity
from mlxfun.model.experts import Bank
from mlxfun.scans.reports import TopToken

if TYPE_CHECKING:
    from mlxfun.arrays import Array

OFTEN = 3
"""How often a token must occur to be looked at."""
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer on some text. tokens: int [T]; experts: int [T, K]; weights: float [T, K];
    inputs [T, D] and logits float32 [T, R] as lazy arrays were evaluated."""

    tokens: Array
    experts: Array
    weights: Array
    inputs: mx.array
    logits: mx.array


def watch(model: Any, taps: Taps, position: int, text: Sequence[Array], ctx: Context) -> Seen:
    """Run `text`, token sequences, and keep what the layer at `position` did."""
    parts: list[Record] = []
    tap = taps.layers[position]
    with taps.recording(norms=False, logits=True), _inputs_of(tap):
        for number, sequence in enumerate(text):
            ctx.check()
            out = model(mx.array(sequence)[None])
            record = taps.drain()[position][-1]
            mx.eval(out, record.arrays())
            parts.append(record)
            ctx.progress("watching the expert", number + 1, len(text), "samples")
    width = tap.layer.top_k
    return Seen(
        tokens=np.concatenate(list(text)),
        experts=np.concatenate([np.array(r.indices).reshape(-1, width) for r in parts]),
        weights=np.concatenate(
            [np.array(_shown(r.weights).astype(mx.float32)).reshape(-1, width) for r in parts]
        ),
        inputs=mx.concatenate([_flat(_shown(r.inputs)) for r in parts]),
        logits=mx.concatenate([_flat(_shown(r.logits)).astype(mx.float32) for r in parts]),
    )


@contextmanager
def _inputs_of(tap: LayerTap) -> Iterator[None]:
    """Keep what the experts of one layer are given."""
    tap.want_inputs = True
    try:
        yield
    finally:
        tap.want_inputs = False


def _shown(array: mx.array | None) -> mx.array:
    if array is None:
        raise RuntimeError(
            "the forward did not show what the layer routes; see mlxfun.hooks.routing"
        )
    return array


def _flat(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def top_tokens(tokens: Array, served: Array, shown: int = SHOWN) -> list[tuple[int, int, int]]:
    """(token, times served, times seen), the largest share first, then the more frequent.

    tokens: int [T]; served: bool [T], whether the expert served it.

    >>> top_tokens(np.array([5, 5, 5, 7, 7, 7, 9]), np.array([1, 1, 0, 1, 1, 1, 1], bool))
    [(7, 3, 3), (5, 2, 3)]
    """
    kinds, place, seen = np.unique(tokens, return_inverse=True, return_counts=True)
    hits = np.bincount(place, weights=served, minlength=len(kinds)).astype(int)
    found = [
        (int(kind), int(hit), int(of))
        for kind, hit, of in zip(kinds, hits, seen, strict=True)
        if of >= OFTEN and hit
    ]
    found.sort(key=lambda row: (-row[1] / row[2], -row[2], row[0]))
    return found[:shown]


def named(rows: Sequence[tuple[int, int, int]], tokenizer: Any) -> tuple[TopToken, ...]:
    """With the text of each token."""
    return tuple(TopToken(tokenizer.decode([token]), hit, of) for token, hit, of in rows)


def partner(
    tap: LayerTap, modules: dict[str, Any], seen: Seen, expert: int
) -> tuple[int | None, float, str]:
    """(the expert most like `expert`, how alike, "") or (None, 0.0, why there is none)."""
    try:
        bank = Bank.of(tap, modules)
    except PlanError as problem:
        return None, 0.0, str(problem)
    live = len(tap.live)
    if live < 2:
        return None, 0.0, "it is the only expert of its layer"
    z = seen.logits
    sigmoid = tap.layer.facts.score == "sigmoid"
    gates = (mx.sigmoid(z) if sigmoid else mx.softmax(z, axis=-1))[:, :live]
    inside = tap.layer.facts.weights_inside
    outputs = mean_outputs(bank, bank.activations(seen.inputs[None]), None if inside else gates)
    mx.eval(outputs)
    alike = similarity(np.array(outputs), np.array(z[:, :live]))
    row = np.array(alike[tap.live.index(expert)], dtype=np.float64)
    row[tap.live.index(expert)] = -np.inf
    best = int(np.argmax(row))
    return tap.live[best], float(row[best]), ""
