"""Studying the live side of a session on data sets: activations, probes, tuned lens, features, vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_sequences
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.plans import SHOWN_SIDES
from mlxfun.errors import UsageError
from mlxfun.evaluation.task_options import TaskOptions, TaskReport
from mlxfun.evaluation.tasks import run_tasks
from mlxfun.generation.answers import read_prompts
from mlxfun.session.looking import Looking
from mlxfun.tracing import reports
from mlxfun.tracing.activations import Work, batch_get_activations, get_activations
from mlxfun.tracing.lenses.probe import train_probe
from mlxfun.tracing.lenses.tuned import Tuning, save_lens, tune_lens
from mlxfun.tracing.options import (
    ActivationOptions,
    ProbeTrainOptions,
    SaeFeaturesOptions,
    SaeTrainOptions,
    SaeUseOptions,
    TuneLensOptions,
    VectorOptions,
)
from mlxfun.tracing.sae.study import feature_change, look_through, train_and_judge
from mlxfun.tracing.vectors.vectors import (
    SteeringVectors,
    load_vectors,
    make_vectors,
    require_fitting,
    save_vectors,
)


class Studying(Looking):
    """Work on data sets, and the steering vectors that come of it."""

    @property
    def vectors(self) -> dict[str, SteeringVectors]:
        """Steering vectors in hand, by name."""
        self._own()
        return self._vectors

    def _samples(self, data: DatasetOptions, prompts: bool, ctx: Context) -> list[list[int]]:
        read = (data, self.tokenizer, self.map.vocabulary, ctx.reading())
        rows = read_prompts(*read)[0] if prompts else read_sequences(*read)
        return [row.tolist() for row in rows]

    def _made_on(self) -> dict[str, str]:
        side = self.editor.live_state
        return {"state": side, "checkpoint": self.checkpoint_id,
                "steering": self.editor.steering.brief}  # fmt: skip

    def tasks(self, options: TaskOptions, ctx: Context = SILENT) -> TaskReport:
        """Score the live side, steering included, in tasks of lm-evaluation-harness."""
        self._own()
        began = monotonic()
        rows, version = run_tasks(self.model, self.tokenizer, options, ctx)
        return TaskReport(
            state=self.editor.live_state,
            side=SHOWN_SIDES[self.editor.side],
            rows=rows,
            limit=options.limit,
            version=version,
            seconds=monotonic() - began,
        )

    def save_activations(
        self, options: ActivationOptions, data: DatasetOptions, ctx: Context = SILENT
    ) -> reports.ActivationsReport:
        """Write activations of a data set to a safetensors file, batch by batch."""
        self._own()
        work = Work(ctx=ctx, made_on=self._made_on())
        rows = self._samples(data, options.prompts, ctx)
        done = batch_get_activations(
            self.tracer, rows, options.path, options.at, options.position, work
        )
        return reports.ActivationsReport(str(done.path), done.names, done.rows, done.bytes)

    def train_probes(
        self,
        options: ProbeTrainOptions,
        classes: Mapping[str, DatasetOptions],
        ctx: Context = SILENT,
    ) -> reports.ProbesReport:
        """Train a linear probe at each layer to tell data sets apart, judged on held-out samples."""
        self._own()
        sets = {name: self._samples(data, options.prompts, ctx) for name, data in classes.items()}
        labels = [name for name, rows in sets.items() for _ in rows]
        prompts = [row for rows in sets.values() for row in rows]
        layers = list(
            range(self.tracer.parts.names.layers) if options.layers is None else options.layers
        )
        found = get_activations(self.tracer, prompts, layers, options.position, Work(ctx=ctx))
        if not layers:
            raise UsageError("no layers to train probes at; give at least one")
        rows, probe = [], None
        for done, layer in enumerate(layers):
            ctx.check()
            x = np.array(found[layer].astype(mx.float32)).reshape(len(prompts), -1)
            probe = train_probe(x, labels, held_out=options.held_out, seed=options.seed)
            rows.append((layer, probe.accuracy, probe.balanced))
            ctx.progress("training probes", done + 1, len(layers), "layers")
        assert probe is not None
        return reports.ProbesReport(
            probe.classes, tuple(rows), probe.baseline, probe.trained, probe.held_out
        )

    def tune_lens(
        self, options: TuneLensOptions, data: DatasetOptions, ctx: Context = SILENT
    ) -> reports.TunedLensReport:
        """Train a tuned lens of the live side on a data set, and write it to a file."""
        self._own()
        tuning = Tuning(options.passes, options.rate, seed=data.seed, ctx=ctx)
        made = tune_lens(self.tracer, self._samples(data, False, ctx), options.layers, tuning)
        about = {**made.about, **self._made_on(), "data": " ".join(data.words)}
        save_lens(replace(made, about=about), options.path)
        rows = tuple((n, made.before[n], made.after[n]) for n in made.before)
        return reports.TunedLensReport(str(options.path), rows)

    # -- sparse autoencoders ----------------------------------------------------------------------

    def train_sae(
        self, options: SaeTrainOptions, data: DatasetOptions | None, ctx: Context = SILENT
    ) -> reports.SaeReport:
        """Train a sparse autoencoder of one value of the live side, and judge it.

        data: what it is trained on; with a file of activations (options.values) what it is judged
        on, and then None leaves that out.
        """
        self._own()
        rows = None if data is None else self._samples(data, False, ctx)
        said = self._made_on() | ({} if data is None else {"data": " ".join(data.words)})
        return train_and_judge(self.tracer, rows, options, said, ctx)

    def sae_features(
        self, options: SaeFeaturesOptions, data: DatasetOptions, ctx: Context = SILENT
    ) -> reports.SaeFeaturesReport:
        """Where the features of an autoencoder are active over a data set."""
        self._own()
        return look_through(self.tracer, self._samples(data, False, ctx), options, ctx)

    def sae_change(self, options: SaeUseOptions) -> tuple[str, Any]:
        """(name, intervention) that steers by a feature of an autoencoder, for `intervene`."""
        self._own()
        return feature_change(self.tracer, options)

    # -- steering vectors -------------------------------------------------------------------------

    def make_vector(
        self,
        options: VectorOptions,
        positive: DatasetOptions,
        negative: DatasetOptions,
        ctx: Context = SILENT,
    ) -> reports.VectorsReport:
        """Make steering vectors of two data sets and keep them under a name."""
        self._own()
        prompts = options.prompts
        sets = self._samples(positive, prompts, ctx), self._samples(negative, prompts, ctx)
        said = {"positive": " ".join(positive.words), "negative": " ".join(negative.words)}
        work = Work(ctx=ctx, made_on=self._made_on() | said)
        made = make_vectors(
            self.tracer, sets, options.method, options.layers, options.position, work
        )
        self._vectors[options.name] = made
        return reports.VectorsReport((_row(options.name, made),))

    def list_vectors(self) -> reports.VectorsReport:
        """The vectors in hand, and the interventions in force."""
        self._own()
        rows = tuple(_row(name, made) for name, made in self._vectors.items())
        standing = tuple(one.described for one in self.editor.steering.interventions)
        return reports.VectorsReport(rows, standing)

    def save_vector(self, name: str, path: Path) -> reports.VectorsReport:
        """Write vectors in hand to a file."""
        self._own()
        found = self._vector(name)
        save_vectors(found, path)
        return reports.VectorsReport((replace(_row(name, found), path=str(path)),))

    def load_vector(self, path: Path) -> str:
        """Read vectors from a file and keep them under its path; the name they have then."""
        self._own()
        found = load_vectors(path)
        require_fitting(found, self.tracer, str(path))
        self._vectors[str(path)] = found
        return str(path)

    def vector(self, name: str, layer: int | None) -> tuple[int, Any]:
        """(layer, vector [D]) of vectors in hand; the layer that tells its samples apart best, where
        none is named. Raises UsageError for a layer without a vector."""
        found = self._vector(name)
        if layer is None:
            layer = max(found.layers, key=lambda n: (found.told_apart.get(n, 0.0), -n))
        if layer not in found.layers:
            raise UsageError(
                f"{name} has no vector for layer {layer}; it has {', '.join(map(str, found.layers))}"
            )
        return layer, found.layers[layer]

    def _vector(self, name: str) -> SteeringVectors:
        if name not in self._vectors:
            known = ", ".join(self._vectors) or "none yet"
            raise UsageError(
                f"there are no vectors called {name!r} in hand ({known}); see vector make"
            )
        return self._vectors[name]


def _row(name: str, made: SteeringVectors) -> reports.VectorRow:
    norms = tuple((layer, float(np.linalg.norm(v))) for layer, v in made.layers.items())
    about = made.about
    return reports.VectorRow(
        name, made.method, norms, tuple(made.told_apart.items()), about.get("state", ""),
        int(about.get("positive samples", 0)), int(about.get("negative samples", 0)),
    )  # fmt: skip
