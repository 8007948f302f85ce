"""Logit lens: what the model would say if it ended at a layer.

    logits[l, t] = head(norm(residual[l, t]))

nostalgebraist, interpreting GPT: the logit lens, 2020. One forward keeps the residual stream of
the layers; the model's own ending reads it in chunks, so that the logits [L, T, V] are never there
at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.errors import UsageError
from mlxfun.tracing.lenses.ending import Ending
from mlxfun.tracing.patching.metrics import TokenLike, token_id
from mlxfun.tracing.patching.plot import Axis, Plot
from mlxfun.tracing.prompts import Prompt, encode, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved

CHUNK_BYTES = 64 << 20

Translate = Callable[[int, mx.array], mx.array]
"""(layer, residual [n, D]) -> what the model's ending reads, [n, D]; a tuned lens."""


@dataclass(frozen=True, slots=True)
class Lens:
    """layers: all by default. positions: of the prompt, all by default. answers: tokens whose
    probability and rank are kept. chunk_bytes: of the logits that are there at once."""

    layers: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    top_k: int = 5
    answers: tuple[TokenLike, ...] = ()
    chunk_bytes: int = CHUNK_BYTES
    translate: Translate | None = None
    ctx: Context = field(default=SILENT)


@dataclass(frozen=True, slots=True)
class LensResult:
    """layers: decoder layers [L]. positions: [T], of the prompt. tokens: their texts.

    ids: int [L, T, k], most probable first; words: their texts; probabilities: float32 [L, T, k].
    entropy: [L, T], nats. answers: texts [A]; answer_probabilities, answer_ranks: [L, T, A], rank 1
    is the most probable token. model_ids: [T], what the whole model says.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    ids: Array
    words: tuple[tuple[tuple[str, ...], ...], ...]
    probabilities: Array
    entropy: Array
    answers: tuple[str, ...]
    answer_probabilities: Array
    answer_ranks: Array
    model_ids: Array

    def first_layer(self, place: int = -1, answer: int | None = None) -> int | None:
        """The first layer from which on the most probable token stays the model's own answer.

        place: index into `positions`. answer: index into `answers`, in place of the model's own.
        None where the last of the layers says something else.
        """
        if answer is None:
            hit = self.ids[:, place, 0] == self.model_ids[place]
        else:
            hit = self.answer_ranks[:, place, answer] == 1
        if not hit[-1]:
            return None
        wrong = np.flatnonzero(~hit)
        return self.layers[int(wrong[-1]) + 1 if wrong.size else 0]

    def summary(self) -> str:
        """One sentence about the last position."""
        word, chance = self.words[-1][-1][0], float(self.probabilities[-1, -1, 0])
        first = self.first_layer()
        since = "no layer ranks the model's answer first"
        if first is not None:
            since = f"the model's answer is ranked first from layer {first} on"
        return f"layer {self.layers[-1]} says {word!r} ({chance:.0%}); {since}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "layers": list(self.layers),
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "ids": self.ids.tolist(),
            "words": self.words,
            "probabilities": self.probabilities.tolist(),
            "entropy": self.entropy.tolist(),
            "answers": list(self.answers),
            "answer_probabilities": self.answer_probabilities.tolist(),
            "answer_ranks": self.answer_ranks.tolist(),
            "model_ids": self.model_ids.tolist(),
        }

    def to_json(self) -> str:
        """The same as a JSON object."""
        return json.dumps(self.to_dict())

    def to_markdown(self) -> str:
        """The most probable token of each layer at each position."""
        heads = [f"`{_cell(t)}`" for t in self.tokens]
        lines = [f"{self.summary()}.", "", "| layer | " + " | ".join(heads) + " |",
                 "|---:|" + "---|" * len(heads)]  # fmt: skip
        for row in range(len(self.layers) - 1, -1, -1):
            cells = [
                f"`{_cell(words[0])}` {self.probabilities[row, place, 0]:.2f}"
                for place, words in enumerate(self.words[row])
            ]
            lines.append(f"| {self.layers[row]} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def plot(self) -> str:
        """The same as `drawing`, an SVG document."""
        return self.drawing().svg()

    def drawing(self) -> Plot:
        """The probability of each layer's most probable token."""
        return Plot(
            self.probabilities[..., 0],
            Axis("layer", [str(layer) for layer in self.layers]),
            Axis(
                "position", [f"{p} {t}" for p, t in zip(self.positions, self.tokens, strict=True)]
            ),
            "logit lens: probability of the most probable token",
            [[words[0] for words in row] for row in self.words],
        )


def _cell(text: str) -> str:
    clear = "".join(c if c.isprintable() else " " for c in text)
    return clear.replace("`", "'").replace("|", "\\|")


def logit_lens(
    model: Tracer,
    prompt: Prompt,
    options: Lens = Lens(),
) -> LensResult:
    """What each layer would say at each position. Raises UsageError for layers that are none."""
    parts, o = model.parts, options
    (row,) = encode(parts.tokenizer, prompt, parts.map.vocabulary)
    layers = _layers(model, o.layers)
    places = list(range(len(row))) if o.positions is None else list(o.positions)
    saved = {n: Saved(parts.names.point(f"layers.{n}.residual"), places) for n in layers}
    output = Saved(parts.names.point("output"), places)
    last = Saved(parts.names.point("layers.-1.residual"), [-1])
    end = Saved(parts.names.point("output"), -1)
    run_once(parts, padded([row]), [], [*saved.values(), output, last, end])
    answers = [token_id(parts.tokenizer, token) for token in o.answers]
    ending = Ending(parts)
    ending.require_whole(last.value.squeeze(1 if ending.streams == 0 else 0), end.value)
    read = _Reader(ending, o, answers, parts.map.vocabulary or 1)
    for done, (layer, one) in enumerate(saved.items()):
        o.ctx.check()
        read.layer(layer, one.value)
        o.ctx.progress("reading layers", done + 1, len(layers), "layers")
    ids = np.stack(read.ids)
    decode = parts.tokenizer.decode
    words = tuple(tuple(tuple(decode([i]) for i in cell) for cell in line) for line in ids.tolist())
    places = [p % len(row) for p in places]
    return LensResult(
        tuple(layers), tuple(places), tuple(decode([row[p]]) for p in places),
        ids, words, np.stack(read.chances), np.stack(read.entropy),
        tuple(decode([i]) for i in answers), np.stack(read.answer_chances),
        np.stack(read.answer_ranks), np.array(mx.argmax(output.value[0], axis=-1)),
    )  # fmt: skip


def _layers(model: Tracer, layers: Sequence[int] | None) -> list[int]:
    count = model.parts.names.layers
    chosen = list(range(count)) if layers is None else [n + count if n < 0 else n for n in layers]
    for layer in chosen:
        if not 0 <= layer < count:
            raise UsageError(
                f"there is no decoder layer {layer}; there are {count}, 0 to {count - 1}"
            )
    if not chosen:
        raise UsageError("no layers to read; give at least one")
    return chosen


class _Reader:
    """Reads the layers, one after the other, in chunks of positions."""

    def __init__(
        self, ending: Ending, options: Lens, answers: Sequence[int], vocabulary: int
    ) -> None:
        if options.top_k < 1:
            raise UsageError(f"top_k {options.top_k} must be at least 1")
        self._ending, self._options, self._answers = ending, options, list(answers)
        self._rows = max(1, options.chunk_bytes // (4 * vocabulary))
        self.ids: list[Array] = []
        self.chances: list[Array] = []
        self.entropy: list[Array] = []
        self.answer_chances: list[Array] = []
        self.answer_ranks: list[Array] = []

    def layer(self, layer: int, residual: mx.array) -> None:
        """residual: [1, T, D], or with the axis of the streams."""
        axis = 1 if self._ending.streams == 0 else 0
        hidden = residual.squeeze(axis)
        count = hidden.shape[axis]
        chunks = []
        for start in range(0, count, self._rows):
            stop = min(start + self._rows, count)
            some = hidden[:, start:stop] if axis == 1 else hidden[start:stop]
            if self._options.translate is not None:
                some = self._options.translate(layer, some)
            chunks.append(self._read(self._ending.logits(some)))
            mx.eval(chunks[-1])
        joined = [np.array(mx.concatenate([chunk[i] for chunk in chunks])) for i in range(5)]
        kept = (self.ids, self.chances, self.entropy, self.answer_chances, self.answer_ranks)
        for rows, array in zip(kept, joined, strict=True):
            rows.append(array)

    def _read(self, logits: mx.array) -> tuple[mx.array, ...]:
        """ids, probabilities [n, k], entropy [n], probabilities and ranks of the answers [n, A]."""
        z = logits.astype(mx.float32)
        # One exp over the vocabulary: entropy = log sum - sum(e z) / sum(e).
        top = mx.max(z, axis=-1, keepdims=True)
        e = mx.exp(z - top)
        total = mx.sum(e, axis=-1, keepdims=True)
        log_sum = top + mx.log(total)
        k = min(self._options.top_k, z.shape[-1])
        some = mx.argpartition(-z, k - 1, axis=-1)[:, :k]
        order = mx.argsort(-mx.take_along_axis(z, some, axis=-1), axis=-1)
        ids = mx.take_along_axis(some, order, axis=-1)
        # Logits of -inf have no part, and 0 times -inf would be nan.
        finite = mx.maximum(z, -1e30)
        entropy = (log_sum - mx.sum(e * finite, axis=-1, keepdims=True) / total)[:, 0]
        wanted = mx.array(self._answers, mx.int32)
        mine = mx.take(z, wanted, axis=-1)
        ranks = [mx.sum(z > mine[:, i : i + 1], axis=-1) + 1 for i in range(len(self._answers))]
        stacked = mx.stack(ranks, axis=-1) if ranks else mx.zeros((z.shape[0], 0), mx.int32)
        chances = mx.exp(mx.take_along_axis(z, ids, axis=-1) - log_sum)
        return ids, chances, entropy, mx.exp(mine - log_sum), stacked
