"""The profile of one expert: tokens it serves most, and its nearest neighbour in the layer.

Both are looked at on the committed weights without steering, on the beginning of a data set. A
token's share is how many of its occurrences the expert served; rare tokens say nothing, so a token
has to occur a few times. Alikeness is that of merging (mlxfun.model.expert_similarity): how alike two
experts' mean outputs are, and the router's logits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.calibration.reports import WhyReport
from mlxfun.context import Context
from mlxfun.data.datasets import Batch, Tokenizer
from mlxfun.errors import PlanError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward
from mlxfun.hooks.routing import LayerTap, Record, Recording, Taps, Wanted
from mlxfun.model.expert_similarity import mean_outputs, similarity
from mlxfun.model.experts import Bank
from mlxfun.model.live_experts import LiveExperts
from mlxfun.scans.reports import DossierReport, Finding, TopToken
from mlxfun.scans.token_classes import candidates, findings, preferences

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


def watch(model: nn.Module, taps: Taps, position: int, text: Sequence[Array], ctx: Context) -> Seen:
    """Run `text`, token sequences, and keep what the layer at `position` did."""
    parts: list[Record] = []
    tap, label = taps.layers[position], "watching the expert"
    todo = [
        Batch(sequence[None], np.ones((1, len(sequence)), np.bool_), (number,))
        for number, sequence in enumerate(text)
    ]

    def one(batch: Batch) -> Watch[Record]:
        return _watch(model, taps, position, batch)

    for batch, record in each_forward(model, taps.anatomy, todo, one, ctx, Task(label)):
        parts.append(record)
        ctx.progress(label, batch.rows[0] + 1, len(text), "samples")
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


def watch_choices(model: nn.Module, taps: Taps, text: Sequence[Array], ctx: Context) -> list[Array]:
    """Run `text` and keep the chosen experts of every MoE layer: int [T, K] for each."""
    parts: list[list[Array]] = [[] for _ in taps.layers]
    todo = [
        Batch(sequence[None], np.ones((1, len(sequence)), np.bool_), (number,))
        for number, sequence in enumerate(text)
    ]
    label = "watching all experts"

    def one(batch: Batch) -> Watch[list[Array]]:
        recording = Recording(Wanted(norms=False), tuple(range(len(taps.layers))))

        def run() -> list[Array]:
            model(mx.array(batch.tokens))
            found = [records[-1] for records in recording.drain()]
            mx.eval([record.arrays() for record in found])
            return [_chosen(tap, record) for tap, record in zip(taps.layers, found, strict=True)]

        return Watch(run, lambda: taps.telling(recording))

    for batch, chosen in each_forward(model, taps.anatomy, todo, one, ctx, Task(label)):
        for layer, indices in zip(parts, chosen, strict=True):
            layer.append(indices)
        ctx.progress(label, batch.rows[0] + 1, len(text), "samples")
    return [np.concatenate(layer) for layer in parts]


def _chosen(tap: LayerTap, record: Record) -> Array:
    """The experts of one evaluated record, int [T, K]; -1 where none was routed to."""
    width = record.indices.shape[-1]
    chosen = np.array(record.indices).reshape(-1, width).astype(np.int64)
    if tap.layer.router_rows > tap.layer.num_experts:
        # longcat's zero experts appear as index 0 with weight 0.
        weights = np.array(_shown(record.weights).astype(mx.float32)).reshape(-1, width)
        chosen[weights == 0] = -1
    return chosen


def topics_of(
    text: Sequence[Array], chosen: Sequence[Array], experts: int, tokenizer: Tokenizer
) -> list[list[Finding]]:
    """The topic of each of `experts` experts, for each layer. chosen: as `watch_choices` gives it."""
    found = candidates(text, tokenizer)
    each = [preferences(found, served_by(indices, experts)) for indices in chosen]
    # Side by side: all that is looked at counts in the bound on false findings.
    together = type(each[0])(
        *(np.concatenate([getattr(one, name) for one in each], axis=1)
          for name in ("p", "share", "other", "part", "excess"))
    )  # fmt: skip
    flat = findings(found.names, together)
    return [flat[n * experts : (n + 1) * experts] for n in range(len(chosen))]


def served_by(indices: Array, experts: int) -> Array:
    """float64 [T, E]: 1 where a token was routed to an expert. indices: int [T, K]; -1 is none."""
    served = np.zeros((len(indices), experts))
    rows, slots = np.nonzero((indices >= 0) & (indices < experts))
    served[rows, indices[rows, slots]] = 1.0
    return served


def _watch(model: nn.Module, taps: Taps, position: int, batch: Batch) -> Watch[Record]:
    """The record of one sequence, evaluated; what is behind its layer is not computed for it."""
    recording = Recording(Wanted(norms=False, logits=True, inputs=True), (position,))

    def run() -> Record:
        model(mx.array(batch.tokens))
        record = recording.drain()[0][-1]
        mx.eval(record.arrays())
        return record

    return Watch(run, lambda: taps.telling(recording))


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


def named(rows: Sequence[tuple[int, int, int]], tokenizer: Tokenizer) -> tuple[TopToken, ...]:
    """With the text of each token."""
    return tuple(TopToken(tokenizer.decode([token]), hit, of) for token, hit, of in rows)


def partner(
    moe: LiveExperts, modules: dict[str, Any], seen: Seen, expert: int
) -> tuple[int | None, float, str]:
    """(the expert most like `expert`, how alike, "") or (None, 0.0, why there is none)."""
    try:
        bank = Bank.of(moe, modules)
    except PlanError as problem:
        return None, 0.0, str(problem)
    live = len(moe.live)
    if live < 2:
        return None, 0.0, "it is the only expert of its layer"
    z = seen.logits
    sigmoid = moe.layer.facts.score == "sigmoid"
    gates = (mx.sigmoid(z) if sigmoid else mx.softmax(z, axis=-1))[:, :live]
    inside = moe.layer.facts.weights_inside
    outputs = mean_outputs(bank, bank.activations(seen.inputs[None]), None if inside else gates)
    mx.eval(outputs)
    alike = similarity(np.array(outputs), np.array(z[:, :live]))
    row = np.array(alike[moe.live.index(expert)], dtype=np.float64)
    row[moe.live.index(expert)] = -np.inf
    best = int(np.argmax(row))
    return moe.live[best], float(row[best]), ""


def report(
    why: WhyReport,
    dataset: str,
    seen: Seen,
    expert: int,
    nearest: tuple[int | None, float, str],
    text: tuple[Sequence[Array], Tokenizer],
) -> DossierReport:
    """What was seen of one expert. nearest: as `partner` gives it. text: the sequences, and what
    tells their words."""
    here = seen.experts == expert
    served = here.any(axis=1)
    sequences, tokenizer = text
    looked = candidates(sequences, tokenizer)
    told = findings(looked.names, preferences(looked, served[:, None].astype(np.float64)))[0]
    return DossierReport(
        why=why,
        dataset=dataset,
        tokens=len(seen.tokens),
        served=int(served.sum()),
        mean_weight=float(seen.weights[here].mean()) if here.any() else 0.0,
        top_tokens=named(top_tokens(seen.tokens, served), tokenizer),
        partner=nearest[0],
        alike=nearest[1],
        note=nearest[2],
        topic=told.words,
        topic_evidence=told.evidence,
        topic_q=told.q,
    )
