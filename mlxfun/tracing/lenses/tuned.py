"""Tuned lens: an affine map for each layer, ahead of the model's own ending.

    h' = h + h A^T + b       trained to give KL(model || ending(h')) its least, from A = 0, b = 0

N. Belrose et al., Eliciting latent predictions from transformers with the tuned lens, 2023. The
model's weights do not change; quantised heads are differentiated in their input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from safetensors.numpy import save as to_safetensors

from mlxfun.arrays import Array
from mlxfun.checkpoint.headers import read_tensors
from mlxfun.context import SILENT, Context
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import writing
from mlxfun.tracing.lenses.ending import Ending
from mlxfun.tracing.names import Point
from mlxfun.tracing.prompts import padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved

FORMAT = "mlxfun tuned lens 1"
Map = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Options of training. passes: over the samples. rate: of Adam. most: tokens of a step, which
    bounds the logits that are there at once. held_out: share of the samples that judge."""

    passes: int = 3
    rate: float = 1e-3
    most: int = 256
    held_out: float = 0.2
    seed: int = 0
    ctx: Context = field(default=SILENT)


@dataclass(frozen=True, slots=True)
class TunedLens:
    """maps: {layer: {"A": [D, D], "b": [D]}}, float32. before, after: {layer: mean KL in nats on
    held-out samples} of the plain and of the tuned lens. about: provenance, as text."""

    maps: Mapping[int, Map]
    before: Mapping[int, float]
    after: Mapping[int, float]
    about: Mapping[str, str] = field(default_factory=dict)

    def translate(self, layer: int, hidden: mx.array) -> mx.array:
        """h' of a layer's residual stream [n, D]; layers without a map as they are."""
        found = self.maps.get(layer)
        return hidden if found is None else _translated(found, hidden)


def _translated(found: Map, hidden: mx.array) -> mx.array:
    h = hidden.astype(mx.float32)
    return (h + h @ found["A"].T + found["b"]).astype(hidden.dtype)


def tune_lens(
    model: Tracer,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    options: Tuning = Tuning(),
) -> TunedLens:
    """Train a map for each layer (all but the last by default) on token ids of samples.

    Raises UsageError for fewer than two samples, ModelError for a model whose residual stream is not
    all that its ending reads, or one with several streams.
    """
    count = model.parts.names.layers
    chosen = list(range(count - 1)) if layers is None else list(layers)
    if len(rows) < 2 or not chosen:
        raise UsageError(
            "a tuned lens is trained on some samples and judged on others: give at least 2"
        )
    order = np.random.default_rng(options.seed).permutation(len(rows))
    cut = min(max(1, round(options.held_out * len(rows))), len(rows) - 1)
    test, train = ([list(rows[i]) for i in some] for some in (order[:cut], order[cut:]))
    trainer = _Trainer(model, chosen, options)
    before = trainer.judged(test)
    steps = 0
    for number in range(options.passes):
        for row in train:
            options.ctx.check()
            trainer.step(row)
            steps += 1
            options.ctx.progress("tuning the lens", steps, options.passes * len(train), "samples")
        train = [train[i] for i in np.random.default_rng(number).permutation(len(train))]
    after = trainer.judged(test)
    about = {"model_type": model.parts.map.model_type, "samples": str(len(rows)),
             "passes": str(options.passes)}  # fmt: skip
    return TunedLens(trainer.maps, before, after, about)


class _Trainer:
    """Maps in training, each with an optimizer of its own."""

    def __init__(self, model: Tracer, layers: Sequence[int], options: Tuning) -> None:
        self._model, self._layers, self._options = model, layers, options
        self._ending = Ending(model.parts)
        width = model.parts.map.hidden_size
        if self._ending.streams is not None or width is None:
            raise UsageError(f"{model.parts.map.model_type} has several residual streams to tune")
        self.maps: dict[int, Map] = {
            n: {"A": mx.zeros((width, width)), "b": mx.zeros((width,))} for n in layers
        }
        self._adam: dict[int, Any] = {n: optimizers.Adam(options.rate) for n in layers}
        self._checked = False

    def _seen(self, row: Sequence[int]) -> tuple[dict[int, mx.array], mx.array]:
        """{layer: residual [T, D]} and the model's log-probabilities [T, V] of one sample."""
        names = self._model.parts.names
        points: list[Point] = [names.point(f"layers.{n}.residual") for n in self._layers]
        saved = [
            Saved(p) for p in (*points, names.point("layers.-1.residual"), names.point("output"))
        ]
        some = list(row)[: self._options.most]
        run_once(self._model.parts, padded([some]), [], saved)
        *streams, last, output = (one.value[0] for one in saved)
        if not self._checked:
            self._ending.require_whole(last[:2], output[:2])
            self._checked = True
        z = output.astype(mx.float32)
        return dict(zip(self._layers, streams, strict=True)), z - mx.logsumexp(z, -1, keepdims=True)

    def _loss(self, found: Map, hidden: mx.array, target: mx.array) -> mx.array:
        """Mean KL(model || lens) in nats."""
        z = self._ending.logits(_translated(found, hidden)).astype(mx.float32)
        log_q = z - mx.logsumexp(z, axis=-1, keepdims=True)
        p = mx.exp(target)
        return mx.mean(mx.sum(mx.where(p > 0, p * (target - log_q), 0.0), axis=-1))

    def step(self, row: Sequence[int]) -> None:
        """One step of every layer's map on one sample."""
        streams, target = self._seen(row)
        for layer, hidden in streams.items():
            self._ending.logits(hidden[:1])  # chooses its way outside of the gradient
            slope = mx.grad(self._loss)(self.maps[layer], hidden, target)
            self.maps[layer] = self._adam[layer].apply_gradients(slope, self.maps[layer])
            mx.eval(self.maps[layer], self._adam[layer].state)

    def judged(self, rows: Sequence[Sequence[int]]) -> dict[int, float]:
        """{layer: mean KL over samples}."""
        sums = dict.fromkeys(self._layers, 0.0)
        for row in rows:
            self._options.ctx.check()
            streams, target = self._seen(row)
            for layer, hidden in streams.items():
                loss = self._loss(self.maps[layer], hidden, target)
                sums[layer] += float(np.array(loss)) / len(rows)
        return sums


def save_lens(lens: TunedLens, path: Path) -> None:
    """Write a safetensors file with provenance in its metadata. Raises SaveError."""
    arrays: dict[str, Array] = {
        f"layers.{n}.{name}": np.array(array) for n, found in lens.maps.items()
        for name, array in found.items()
    }  # fmt: skip
    figures = {"before": lens.before, "after": lens.after}
    said = {"format": FORMAT, "figures": json.dumps(figures), **lens.about}
    with writing(path) as file:
        file.write(to_safetensors(arrays, said))


def load_lens(path: Path) -> TunedLens:
    """Read such a file. Raises DatasetError for one that is none, ModelError for a corrupt one."""
    if not path.is_file():
        raise DatasetError(f"{path} is no file; name a file that tune-lens has written")
    arrays, said = read_tensors(path, FORMAT)
    if said.get("format") != FORMAT:
        raise DatasetError(f"{path} holds no tuned lens; name a file that tune-lens has written")
    maps: dict[int, Map] = {}
    for name, array in arrays.items():
        _, layer, part = name.split(".")
        maps.setdefault(int(layer), {})[part] = mx.array(array)
    mx.eval(maps)
    figures = json.loads(said["figures"])
    before, after = ({int(k): float(v) for k, v in figures[w].items()} for w in ("before", "after"))
    about = {k: v for k, v in said.items() if k not in ("format", "figures")}
    return TunedLens(maps, before, after, about)


def require_fitting_lens(lens: TunedLens, model: Tracer, where: str) -> None:
    """Raise UsageError for a lens of another width, or of layers that the model has not."""
    width, count = model.parts.map.hidden_size, model.parts.names.layers
    for layer, found in lens.maps.items():
        if layer >= count or found["b"].shape != (width,):
            raise UsageError(
                f"{where} has a map of {list(found['b'].shape)} for layer {layer}; "
                f"{model.parts.map.model_type} has {count} layers of {width}"
            )
