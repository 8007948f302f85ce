"""Attention patterns as the model computes them, and heads with a known pattern.

    previous token   looks at the token before
    first token      rests on the first token
    induction        in a repeated text, looks at the token behind the earlier copy of its own

C. Olsson et al., In-context learning and induction heads, 2022.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import UsageError
from mlxfun.tracing.options import HEAD_KINDS, HeadKind
from mlxfun.tracing.patching.plot import Axis, Plot
from mlxfun.tracing.prompts import Prompt, encode, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Attention weights of one prompt. weights: {decoder layer: float32 [H, T, S]}."""

    tokens: tuple[str, ...]
    weights: dict[int, Array]

    def summary(self) -> str:
        """One sentence."""
        layers = ", ".join(map(str, self.weights))
        heads = next(iter(self.weights.values())).shape[0]
        return f"attention of {len(self.tokens)} tokens, {heads} heads, layers {layers}"

    def strongest(
        self, layer: int, head: int, position: int = -1, k: int = 5
    ) -> list[tuple[int, str, float]]:
        """(position, token, weight) of what a token looks at most."""
        row = self.weights[layer][head, position]
        return [(int(i), self.tokens[i], float(row[i])) for i in np.argsort(-row)[:k]]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "tokens": list(self.tokens),
            "weights": {str(layer): w.tolist() for layer, w in self.weights.items()},
        }

    def to_json(self) -> str:
        """The same as a JSON object."""
        return json.dumps(self.to_dict())

    def to_markdown(self, layer: int, head: int) -> str:
        """One head: what each token looks at most."""
        lines = [
            f"Layer {layer}, head {head}.",
            "",
            "| position | token | looks at |",
            "|---:|---|---|",
        ]
        for at, token in enumerate(self.tokens):
            seen = ", ".join(
                f"{i} `{_cell(t)}` {w:.2f}" for i, t, w in self.strongest(layer, head, at, 3)
            )
            lines.append(f"| {at} | `{_cell(token)}` | {seen} |")
        return "\n".join(lines) + "\n"

    def plot(self, layer: int, head: int) -> str:
        """The same as `drawing`, an SVG document."""
        return self.drawing(layer, head).svg()

    def drawing(self, layer: int, head: int) -> Plot:
        """One head as a map, queries down and keys across."""
        labels = [f"{i} {token}" for i, token in enumerate(self.tokens)]
        title = f"attention: layer {layer}, head {head}"
        rows, columns = Axis("query", labels[::-1]), Axis("key", labels)
        return Plot(self.weights[layer][head][::-1], rows, columns, title)


THUMBNAIL = 12
"""Cells of a small map, across and down."""


def thumbnail(weights: Array) -> Array:
    """One head's weights [T, T] as at most THUMBNAIL x THUMBNAIL cells, float64 [n, n]: the mean over
    the queries of a part of what they give to the keys of another. Rows sum to one, as weights do.
    """
    count = min(THUMBNAIL, len(weights))
    edges = np.linspace(0, len(weights), count + 1).astype(int)
    given = np.add.reduceat(weights.astype(np.float64), edges[:-1], axis=1)
    sums: Array = np.add.reduceat(given, edges[:-1], axis=0)
    return sums / np.diff(edges)[:, None]


def figures(weights: Array) -> tuple[float, float, float, float]:
    """Of one head's weights [T, T]: the mean weight on the first token and on the one before, both
    without the first query, on a token itself, and the mean number of tokens that are looked at."""
    w = weights.astype(np.float64)
    first = float(w[1:, 0].mean()) if len(w) > 1 else 0.0
    before = float(np.diagonal(w, -1).mean()) if len(w) > 1 else 0.0
    entropy = -(w * np.log(np.where(w > 0, w, 1.0))).sum(axis=1)
    return first, before, float(np.diagonal(w).mean()), float(np.exp(entropy).mean())


def tiled(maps: Sequence[Array], layer: int, across: int = 5) -> Plot:
    """Small maps of a layer's heads as one drawing, a row of `across` below the other."""
    size = len(maps[0])
    down = -(-len(maps) // across)
    sheet = np.full((down * (size + 1) - 1, across * (size + 1) - 1), np.nan)
    for head, cells in enumerate(maps):
        top, left = head // across * (size + 1), head % across * (size + 1)
        sheet[top : top + size, left : left + size] = cells
    rows, columns = ([""] * length for length in sheet.shape)
    for place in range(down):
        rows[place * (size + 1) + size // 2] = f"heads {place * across}+"
    for place in range(min(across, len(maps))):
        columns[place * (size + 1) + size // 2] = f"+{place}"
    title = f"attention: layer {layer}, {len(maps)} heads"
    return Plot(sheet[::-1], Axis("query, by head", rows[::-1]), Axis("key", columns), title)


def _cell(text: str) -> str:
    clear = "".join(c if c.isprintable() else " " for c in text)
    return clear.replace("`", "'").replace("|", "\\|")


def attention_layers(model: Tracer) -> list[int]:
    """Layers whose attention has weights to be seen."""
    names = model.parts.names
    return [n for n in range(names.layers) if f"layers.{n}.attn.weights" in names.points]


def attention_patterns(
    model: Tracer, prompt: Prompt, layers: Sequence[int] | None = None
) -> AttentionResult:
    """The attention weights of a prompt, after norms and RoPE, masks and sinks included.

    layers: all that have attention by default. Raises UsageError for one that has none.
    """
    parts = model.parts
    (row,) = encode(parts.tokenizer, prompt, parts.map.vocabulary)
    chosen = attention_layers(model) if layers is None else list(layers)
    if not chosen:
        raise UsageError(f"no layer of {parts.map.model_type} has attention weights")
    saved = {n: Saved(parts.names.point(f"layers.{n}.attn.weights")) for n in chosen}
    run_once(parts, padded([row]), [], list(saved.values()))
    tokens = tuple(parts.tokenizer.decode([i]) for i in row)
    return AttentionResult(tokens, {n: one.numpy()[0] for n, one in saved.items()})


@dataclass(frozen=True, slots=True)
class HeadScore:
    """How far a head has a pattern: the mean weight on where the pattern says, 0 to 1."""

    layer: int
    head: int
    score: float


def find_heads(
    model: Tracer,
    kind: HeadKind = "induction",
    *,
    length: int = 32,
    samples: int = 4,
    seed: int = 0,
) -> list[HeadScore]:
    """Every head by how far it has a pattern, the best first.

    Measured on `samples` texts of `length` random tokens, written twice, so that no head can go by
    what the words mean.
    """
    if kind not in HEAD_KINDS:
        raise UsageError(f"there is no pattern {kind!r}; there are {', '.join(HEAD_KINDS)}")
    parts = model.parts
    vocabulary = parts.map.vocabulary or 2
    half = np.random.default_rng(seed).integers(1, vocabulary, (samples, length))
    rows = np.concatenate([half, half], axis=1).tolist()
    layers = attention_layers(model)
    saved = {n: Saved(parts.names.point(f"layers.{n}.attn.weights")) for n in layers}
    run_once(parts, padded(rows), [], list(saved.values()))
    query = np.arange(length, 2 * length)
    key = {"previous token": query - 1, "first token": query * 0, "induction": query - length + 1}
    found = [
        HeadScore(n, head, float(one.numpy()[:, head][:, query, key[kind]].mean()))
        for n, one in saved.items()
        for head in range(one.shape[1])
    ]
    return sorted(found, key=lambda score: -score.score)


def residual_norms(model: Tracer, prompt: Prompt) -> Array:
    """L2 norm of the residual stream at each position, float32 [layers + 1, T]; the first row is
    what enters layer 0. Of several streams, over all of them together."""
    parts = model.parts
    (row,) = encode(parts.tokenizer, prompt, parts.map.vocabulary)
    names = ["layers.0.input", *(f"layers.{n}.residual" for n in range(parts.names.layers))]
    saved = [Saved(parts.names.point(name)) for name in names]
    run_once(parts, padded([row]), [], saved)
    found = []
    for one in saved:
        value = one.numpy().astype(np.float32)
        squares = np.moveaxis(value**2, value.shape.index(len(row), 1), 0)
        found.append(np.sqrt(squares.reshape(len(row), -1).sum(-1)))
    return np.stack(found)
