"""What differs inside a forward between two states of a model, and where it begins.

change of a value = |b - a| / |a|      over all tokens of the text
routes            = share of (token, chosen expert) that the other state does not choose
KL(a || b)        of the predictions, in nats, at each position
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import UsageError
from mlxfun.tracing.names import Point
from mlxfun.tracing.prompts import Prompt, encode, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved

PARTS = ("attn.output", "router.choice", "mlp.output", "residual")
"""What is compared of each layer, in the order of a forward."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Values of one forward: {name: value}, float32 but for chosen experts. logits: [T, V]."""

    values: dict[str, Array]
    logits: Array
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """changes: {layer: {part: change}}, parts as in PARTS. first: the first part that differs at all,
    (layer, part), None where nothing does. kl: [T]. words: what each state says last."""

    changes: dict[int, dict[str, float]]
    first: tuple[int, str] | None
    kl: Array
    words: tuple[str, str]
    tokens: tuple[str, ...]


def values_of(model: Tracer, prompt: Prompt) -> Pass:
    """The values of the state that is live."""
    parts = model.parts
    (row,) = encode(parts.tokenizer, prompt, parts.map.vocabulary)
    points: list[Point] = [
        parts.names.points[name]
        for layer in range(parts.names.layers)
        for part in PARTS
        if (name := f"layers.{layer}.{part}") in parts.names.points
    ]
    saved = [Saved(point) for point in (*points, parts.names.point("output"))]
    run_once(parts, padded([row]), [], saved)
    found = {one.name: one.numpy() for one in saved}
    logits = found.pop("output")[0].astype(np.float64)
    return Pass(found, logits, tuple(parts.tokenizer.decode([i]) for i in row))


def difference(model: Tracer, a: Pass, b: Pass) -> Difference:
    """How `b` differs from `a`; both of the same text."""
    if a.tokens != b.tokens:
        raise UsageError("the two forwards are of different texts")
    changes: dict[int, dict[str, float]] = {}
    first: tuple[int, str] | None = None
    for name, before in a.values.items():
        after, (_, number, part) = b.values[name], name.split(".", 2)
        if part == "router.choice":
            change = _rerouted(before, after)
        elif before.shape != after.shape:
            change = float("inf")
        else:
            size = float(np.linalg.norm(before))
            change = float(np.linalg.norm(after - before)) / size if size else 0.0
        changes.setdefault(int(number), {})[part] = change
        if change > 0 and first is None:
            first = int(number), part
    logs = [z - z.max(-1, keepdims=True) for z in (a.logits, b.logits)]
    logs = [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in logs]
    kl = (np.exp(logs[0]) * np.where(np.isfinite(logs[0]), logs[0] - logs[1], 0.0)).sum(-1)
    says = [model.parts.tokenizer.decode([int(np.argmax(p.logits[-1]))]) for p in (a, b)]
    return Difference(changes, first, np.maximum(kl, 0.0), (says[0], says[1]), a.tokens)


def _rerouted(before: Array, after: Array) -> float:
    """Experts chosen before, [B, T, K], that a token's choice after does not hold."""
    missing = ~(before[..., :, None] == after[..., None, :]).any(-1)
    return float(missing.mean())
