"""Training a sparse autoencoder on values of a model, in bounded memory; stopped and taken up again.

    begin    b_dec is the geometric median of the first values, W_dec random rows of unit norm, and
             W_enc = W_dec^T; values are scaled so that E||x - b_dec||^2 = 1 (undone at the end,
             which is exact: ReLU, top-k and thresholds scale along)
    step     Adam on the loss of mlxfun.tracing.sae.losses, its gradient of W_dec without the part
             along each row, then rows of unit norm again
    rate     rises over the first 100 steps, falls to 0 over the last fifth of the run

L. Gao et al., Scaling and evaluating sparse autoencoders, 2024. Samples are shuffled for each pass
and read block by block; a block's values are shuffled among each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

from mlxfun.arrays import Array
from mlxfun.context import SILENT, Context
from mlxfun.errors import Cancelled, UsageError
from mlxfun.tracing.options import SAE_KINDS, SaeTraining
from mlxfun.tracing.sae.autoencoder import Autoencoder
from mlxfun.tracing.sae.checkpoints import Progress, load_progress, require_same, save_progress
from mlxfun.tracing.sae.files import CONFIG, WEIGHTS, save_sae
from mlxfun.tracing.sae.losses import Loss, Params
from mlxfun.tracing.sae.sources import Source

CHECKPOINT = "training.safetensors"
BUFFER_BYTES = 256 << 20
MEDIAN_ROWS = 4096
WARM_UP, FALL = 100, 0.2
SAVE_EVERY = 300.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An autoencoder and how it was trained. tokens: seen; steps: taken. loss: [(tokens, mean
    ||x - x'||^2 / E||x - b_dec||^2 of the steps since the row before)]. dead: share of features
    without activity in the last `dead_after` tokens. held_out: units of the source that were not
    trained on."""

    autoencoder: Autoencoder
    tokens: int
    steps: int
    loss: tuple[tuple[int, float], ...]
    dead: float
    held_out: tuple[int, ...]


def resolved(options: SaeTraining, source: Source) -> SaeTraining:
    """The options with 0 replaced by what it stands for. Raises UsageError for impossible ones."""
    if options.kind not in SAE_KINDS:
        raise UsageError(f"there is no {options.kind!r}; there are {', '.join(SAE_KINDS)}")
    count = options.features or 8 * source.width
    if not 0 < options.k <= count:
        raise UsageError(f"k {options.k} must be between 1 and the {count} features")
    if min(options.passes, options.batch) < 1:
        raise UsageError(f"passes {options.passes} and batch {options.batch} must be at least 1")
    if len(source.sizes) < 2:
        raise UsageError(
            "an autoencoder is trained on some samples and judged on others: give at least 2"
        )
    buffer = min(65536, max(options.batch, BUFFER_BYTES // (4 * source.width)))
    return replace(
        options,
        features=count,
        rate=options.rate or min(3e-3, 2e-4 * (16384 / count) ** 0.5),
        buffer=options.buffer or buffer,
        dead_after=options.dead_after or max(1, min(1_000_000, sum(source.sizes) // 10)),
        bandwidth=options.bandwidth or 0.05 / source.width**0.5,
    )


def split(source: Source, options: SaeTraining) -> tuple[list[int], list[int]]:
    """(units to train on, units that judge), by the seed."""
    order = np.random.default_rng([options.seed, 0]).permutation(len(source.sizes)).tolist()
    cut = min(max(1, round(options.held_out * len(order))), len(order) - 1)
    return sorted(order[cut:]), sorted(order[:cut])


def train_sae(
    source: Source,
    options: SaeTraining = SaeTraining(),  # noqa: B008 - frozen
    directory: Path | None = None,
    resume: bool = False,
    about: Mapping[str, str] | None = None,
    ctx: Context = SILENT,
) -> Trained:
    """Train on all but the held-out units of a source.

    directory: gets the autoencoder (see mlxfun.tracing.sae.files) and training.safetensors, the
    state of training, at the end and when it is cancelled; the latter now and then as well. resume:
    go on from there; what comes out is bit for bit what an uninterrupted run gives. about:
    provenance, which has to be the same when it is resumed.

    Raises UsageError for impossible options, those of another run, a directory with an autoencoder
    that is not resumed, or a source without values; Cancelled, the directory written.
    """
    trainer = Trainer(source, resolved(options, source), about or {})
    checkpoint = None if directory is None else directory / CHECKPOINT
    if resume:
        if checkpoint is None:
            raise UsageError("resume needs the directory of the run that is to go on")
        trainer.take_up(load_progress(checkpoint), checkpoint)
    elif directory is not None:
        require_free(directory)
    try:
        trainer.run(checkpoint, ctx)
    except Cancelled:
        if directory is None or not trainer.begun:
            raise
        trainer.write(directory)
        raise Cancelled(
            f"cancelled after {trainer.at.tokens:,} tokens; what was trained is in {directory}, "
            "and --resume goes on from there"
        ) from None
    if directory is not None:
        trainer.write(directory)
    return trainer.result()


def require_free(directory: Path) -> None:
    """Raise UsageError for a directory that holds an autoencoder: nobody's hours are written over."""
    for name in (CHECKPOINT, CONFIG, WEIGHTS):
        if (directory / name).exists():
            raise UsageError(
                f"{directory} already holds an autoencoder ({name}): --resume goes on with it, or "
                "name another directory"
            )


@dataclass(slots=True)
class Trainer:
    """One training run. at: how far it is."""

    source: Source
    options: SaeTraining
    about: Mapping[str, str]
    at: Progress = field(default_factory=Progress)
    _adam: optimizers.Adam = field(init=False)
    _loss: Loss = field(init=False)

    def __post_init__(self) -> None:
        o = self.options
        self._adam = optimizers.Adam(o.rate, eps=1e-8, bias_correction=True)
        self._loss = Loss(o.kind, o.k, o.sparsity, o.auxiliary, o.bandwidth)

    @property
    def begun(self) -> bool:
        """Whether there are parameters yet."""
        return bool(self.at.params)

    def take_up(self, progress: Progress, where: Path) -> None:
        """Go on from a checkpoint. Raises UsageError for one of other options or values."""
        require_same(progress, self.options, self.source.at, self.about, where)
        self.at = progress
        self._adam.state = progress.adam

    def save(self, path: Path) -> None:
        """Write the state to a checkpoint."""
        self.at.adam = self._adam.state
        save_progress(self.at, self.options, self.source.at, self.about, path)

    def write(self, directory: Path) -> None:
        """The state and the autoencoder as it is now."""
        self.save(directory / CHECKPOINT)
        save_sae(self.result().autoencoder, directory)

    # -- running ----------------------------------------------------------------------------------

    def run(self, checkpoint: Path | None, ctx: Context) -> None:
        """Every step that is left."""
        units, _ = split(self.source, self.options)
        total = self.options.passes * len(units)
        saved = time.monotonic()
        while self.at.passed < self.options.passes:
            blocks = self._blocks(units)
            done = self.at.passed * len(units) + sum(map(len, blocks[: self.at.block]))
            for block in blocks[self.at.block :]:
                for batch, share in self._batches(block, ctx):
                    ctx.check()
                    self._step(batch, (done + share * len(block)) / total)
                    ctx.progress("training the autoencoder", done, total, "samples")
                    if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY:
                        self.save(checkpoint)
                        saved = time.monotonic()
                done += len(block)
                self.at.block, self.at.step = self.at.block + 1, 0
                ctx.progress("training the autoencoder", done, total, "samples")
            self.at.passed, self.at.block = self.at.passed + 1, 0
        if not self.begun:
            raise UsageError(
                f"{self.source.at} has no value on these samples (an expert that no token chooses?); "
                "give more or other text"
            )

    def _blocks(self, units: Sequence[int]) -> list[list[int]]:
        """The units in the order of this pass, in blocks of about `buffer` tokens."""
        rng = np.random.default_rng([self.options.seed, 1, self.at.passed])
        blocks: list[list[int]] = [[]]
        sizes, held = self.source.sizes, 0
        for unit in rng.permutation(units).tolist():
            if held and held + sizes[unit] > self.options.buffer:
                blocks.append([])
                held = 0
            blocks[-1].append(unit)
            held += sizes[unit]
        return blocks

    def _batches(self, block: Sequence[int], ctx: Context) -> list[tuple[mx.array, float]]:
        """(values [n, D] as they are, share of the block before it) of the steps that are left."""
        x = self.source.read(block, ctx)
        if not len(x):
            return []
        if not self.begun:
            self._begin(x)
        rng = np.random.default_rng([self.options.seed, 2, self.at.passed, self.at.block])
        pieces = np.array_split(rng.permutation(len(x)), -(-len(x) // self.options.batch))
        return [
            (mx.array(x[piece]), number / len(pieces))
            for number, piece in enumerate(pieces)
            if number >= self.at.step
        ]

    def _begin(self, x: Array) -> None:
        rng = np.random.default_rng([self.options.seed, 3])
        width, count = self.source.width, self.options.features
        some = x[rng.permutation(len(x))[:MEDIAN_ROWS]].astype(np.float64)
        middle = geometric_median(some)
        spread = float(np.square(some - middle).sum(-1).mean())
        self.at.scale = 1 / max(spread, 1e-30) ** 0.5
        rows = rng.standard_normal((count, width))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        params = {"W_dec": rows, "W_enc": rows.T, "b_dec": middle * self.at.scale,
                  "b_enc": np.zeros(count)}  # fmt: skip
        if self.options.kind == "jumprelu":
            # So many features are active at first that all of them learn something.
            z = (some - middle)[:512] * self.at.scale @ rows.T
            share = min(0.5, 4 * self.options.k / count)
            params["threshold"] = np.full(count, max(float(np.quantile(z, 1 - share)), 1e-3))
        self.at.params = {name: mx.array(a.astype(np.float32)) for name, a in params.items()}
        self.at.idle = np.zeros(count, np.int64)
        self._adam.init(self.at.params)

    def _step(self, batch: mx.array, share: float) -> None:
        """One step of Adam. share: of the whole run that lies behind."""
        o, params = self.options, self.at.params
        idle = self.at.idle >= o.dead_after
        dead = mx.array(idle) if o.auxiliary and idle.any() else None
        x = batch * self.at.scale
        (_, squared, active), slope = mx.value_and_grad(self._loss)(params, x, dead)
        rows = params["W_dec"]
        along = (slope["W_dec"] * rows).sum(-1, keepdims=True)
        slope["W_dec"] = slope["W_dec"] - along * rows
        rate = o.rate * min(1.0, (self.at.steps + 1) / WARM_UP) * min(1.0, (1 - share) / FALL)
        self._adam.learning_rate = mx.array(rate, mx.float32)
        new: Params = self._adam.apply_gradients(slope, params)
        new["W_dec"] = new["W_dec"] / mx.maximum(
            mx.linalg.norm(new["W_dec"], axis=-1, keepdims=True), 1e-12
        )
        mx.eval(new, self._adam.state, squared, active)
        self.at.params = new
        self._count(len(batch), float(np.array(squared)), np.array(active))

    def _count(self, tokens: int, squared: float, active: Array) -> None:
        at = self.at
        if not np.isfinite(squared):
            raise UsageError(
                f"the loss is {squared} after {at.tokens:,} tokens: give a smaller rate than "
                f"{self.options.rate:g}, or look at the values with trace"
            )
        at.idle = np.where(active, 0, at.idle + tokens)
        at.tokens, at.steps, at.step = at.tokens + tokens, at.steps + 1, at.step + 1
        at.sums = (at.sums[0] + squared * tokens, at.sums[1] + tokens)
        if at.steps & (at.steps - 1) == 0 or at.steps % 100 == 0:
            at.loss.append((at.tokens, at.sums[0] / at.sums[1]))
            at.sums = (0.0, 0)

    # -- the end ----------------------------------------------------------------------------------

    def result(self) -> Trained:
        """The autoencoder of values as they are, and the figures of training."""
        at, o, size = self.at, self.options, self.at.scale
        p = at.params
        threshold = mx.maximum(p["threshold"], 0) / size if o.kind == "jumprelu" else None
        made = Autoencoder(
            p["W_enc"], p["b_enc"] / size, p["W_dec"], p["b_dec"] / size, self.source.at,
            k=o.k if o.kind == "topk" else None, threshold=threshold, skip=self.source.skip,
            about=dict(self.about),
        )  # fmt: skip
        mx.eval([a for a in (made.b_enc, made.b_dec, threshold) if a is not None])
        dead = float((at.idle >= min(o.dead_after, at.tokens)).mean())
        return Trained(
            made, at.tokens, at.steps, tuple(at.loss), dead, tuple(split(self.source, o)[1])
        )


def geometric_median(x: Array, most: int = 50) -> Array:
    """The point [D] with the least sum of distances to rows [n, D], by Weiszfeld's iteration."""
    middle: Array = x.mean(0)
    for _ in range(most):
        weight = 1 / np.maximum(np.linalg.norm(x - middle, axis=1), 1e-12)
        new = (x * weight[:, None]).sum(0) / weight.sum()
        if np.linalg.norm(new - middle) <= 1e-7 * (1e-30 + np.linalg.norm(middle)):
            return np.asarray(new)
        middle = new
    return middle
