"""Looking inside the live side of a session: the commands of mlxfun.tracing, with plain reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_sequences
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import StateError, UsageError
from mlxfun.files import write_text
from mlxfun.session.inspection import Inspection
from mlxfun.tracing import reports
from mlxfun.tracing.activations import Work, batch_get_activations, get_activations
from mlxfun.tracing.lenses.difference import PARTS, difference, values_of
from mlxfun.tracing.lenses.direct import direct_logit_attribution
from mlxfun.tracing.lenses.logit_lens import Lens, logit_lens
from mlxfun.tracing.lenses.patterns import attention_patterns, find_heads
from mlxfun.tracing.lenses.probe import train_probe
from mlxfun.tracing.options import (
    EXPORTS,
    ActivationOptions,
    AttentionOptions,
    AttributeOptions,
    DifferenceOptions,
    LensOptions,
    PatchOptions,
    ProbeTrainOptions,
    TraceOptions,
    VectorOptions,
)
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.attribution import attribution_patching
from mlxfun.tracing.patching.path import path_patching
from mlxfun.tracing.patching.result import PatchResult
from mlxfun.tracing.patching.study import Patching
from mlxfun.tracing.values import Saved
from mlxfun.tracing.vectors.vectors import (
    SteeringVectors,
    load_vectors,
    make_vectors,
    require_fitting,
    save_vectors,
)

TOP = 10


class _Result(Protocol):
    """What can be written to a file."""

    def to_json(self) -> str: ...


class Looking(Inspection):
    """Traces, lenses, patching, probes and steering vectors."""

    @property
    def vectors(self) -> dict[str, SteeringVectors]:
        """Steering vectors in hand, by name."""
        self._own()
        return self._vectors

    def trace_values(self, options: TraceOptions) -> reports.TraceReport:
        """Values of one forward over a text, with figures at one position."""
        self._own()
        tracer, position = self.tracer, options.position
        with tracer.trace(options.text) as t:
            found = [t[name].save() for name in options.at]
            logits = t.output.save(positions=position)
        saved: list[Saved] = []
        for one in found:
            saved += one if isinstance(one, list) else [one]
        tokens = t.tokens[0]
        if not -len(tokens) <= position < len(tokens):
            raise UsageError(f"there is no position {position}: the text has {len(tokens)} tokens")
        chances = np.array(mx.softmax(logits.value[0].astype(mx.float32)))
        best = np.argsort(-chances)[:TOP].tolist()
        decode = self.tokenizer.decode
        return reports.TraceReport(
            tuple(decode([i]) for i in tokens),
            position % len(tokens),
            tuple(_traced(one, position % len(tokens)) for one in saved),
            tuple((decode([i]), float(chances[i])) for i in best),
        )

    def difference(self, options: DifferenceOptions) -> reports.DifferenceReport:
        """How the live side differs inside a forward from the checkpoint, from the base of a staged
        plan, or from a node of the history (both then without steering: a state is weights)."""
        self._own()
        editor, against, tracer = self.editor, options.against, self.tracer
        if against in ("checkpoint", "base"):
            if against == "base":
                editor.require_staged("compare with its base")
            with editor.live("candidate" if against == "base" else editor.side):
                after = values_of(tracer, options.text)
            with editor.live("base" if against == "base" else "checkpoint"):
                before = values_of(tracer, options.text)
        elif against.isdigit():
            editor.require_unstaged("comparing with a node of the history")
            with editor.unsteered():
                after = values_of(tracer, options.text)
                with editor.history.excursion(editor.swap):
                    editor.history.goto(int(against), editor.swap)
                    before = values_of(tracer, options.text)
        else:
            raise UsageError(f"{against!r} is no state; name checkpoint, base or a node's number")
        found = difference(tracer, before, after)
        rows = tuple(
            (n, c.get(PARTS[0]), c.get(PARTS[1]), c.get(PARTS[2]), c.get(PARTS[3]))
            for n, c in found.changes.items()
        )
        first = "" if found.first is None else f"layers.{found.first[0]}.{found.first[1]}"
        name = f"node {against}" if against.isdigit() else f"the {against}"
        kl = tuple(float(x) for x in found.kl)
        return reports.DifferenceReport(name, found.tokens, rows, first, kl, found.words)

    def lens(self, options: LensOptions, ctx: Context = SILENT) -> reports.LensReport:
        """What each layer would say, see mlxfun.tracing.lenses.logit_lens."""
        self._own()
        _require_export(options.export)
        lens = Lens(options.layers, options.positions, options.top_k, options.answers, ctx=ctx)
        found = logit_lens(self.tracer, options.text, lens)
        rows = [[str(layer), f"{p} {t}", words[0], f"{x[0]:.6g}"]
                for layer, line, chances in zip(found.layers, found.words, found.probabilities, strict=True)
                for p, t, words, x in zip(found.positions, found.tokens, line, chances, strict=True)]  # fmt: skip
        table = [["layer", "position", "word", "probability"], *rows]
        return reports.LensReport(
            found.layers, found.positions, found.tokens, found.words,
            _nested(found.probabilities), found.first_layer(), found.summary(), found.answers,
            _nested(found.answer_ranks), _nested(found.answer_probabilities),
            _nested(found.ids), options.text,
            _export(options.export, found, found.plot, found.to_markdown, table),
        )  # fmt: skip

    def attention(self, options: AttentionOptions) -> reports.AttentionReport | reports.HeadsReport:
        """The weights of one head, or heads ranked by a pattern."""
        self._own()
        _require_export(options.export)
        if options.find is not None:
            scores = find_heads(self.tracer, options.find)
            rows = tuple((s.layer, s.head, s.score) for s in scores)
            return reports.HeadsReport(options.find, rows)
        layer, head = options.layer, options.head
        found = attention_patterns(self.tracer, options.text, [layer])
        heads = found.weights[layer].shape[0]
        if not 0 <= head < heads:
            raise UsageError(f"layer {layer} has no head {head}; it has {heads}, 0 to {heads - 1}")
        looks = tuple(tuple(i for i, _, _ in found.strongest(layer, head, at, 3))
                      for at in range(len(found.tokens)))  # fmt: skip
        weights = found.weights[layer][head]
        table = [["query", "key", "weight"], *([str(q), str(k), f"{weights[q, k]:.6g}"]
                 for q, k in np.ndindex(weights.shape))]  # fmt: skip
        written = _export(options.export, found, lambda: found.plot(layer, head),
                          lambda: found.to_markdown(layer, head), table)  # fmt: skip
        return reports.AttentionReport(
            layer, head, heads, found.tokens, _nested(weights), looks, options.text, written
        )

    def patch(self, options: PatchOptions, ctx: Context = SILENT) -> reports.PatchReport:
        """Patch components of a clean into a corrupted run, see mlxfun.tracing.patching."""
        self._own()
        _require_export(options.export)
        found = self._patched(options, ctx)
        scores = tuple(
            tuple(None if np.isnan(x) else float(x) for x in row) for row in found.scores
        )
        top = tuple((c.layer, c.column, c.label, c.score) for c in found.top_components(TOP))
        table = [["layer", found.across, "label", "score"],
                 *([str(found.layers[r]), str(c), found.labels[c], f"{found.scores[r, c]:.6g}"]
                   for r, c in np.ndindex(found.scores.shape))]  # fmt: skip
        return reports.PatchReport(
            found.method, found.component, found.metric, found.across, found.layers, found.labels,
            scores, found.clean, found.corrupted, found.answer, found.other, top, found.summary(),
            _export(options.export, found, found.plot, found.to_markdown, table),
        )  # fmt: skip

    def _patched(self, o: PatchOptions, ctx: Context) -> PatchResult:
        if o.other is not None and o.answer is None:
            raise UsageError("another token is compared with an answer: give --answer as well")
        answers = tuple(token for token in (o.answer, o.other) if token is not None)
        how = Patching(answers, o.layers, ctx=ctx)
        if o.method == "path":
            prompts = (o.clean, o.corrupted)
            return path_patching(self.tracer, prompts, o.component, o.receiver, o.metric, how)
        method = activation_patching if o.method == "activation" else attribution_patching
        return method(self.tracer, o.clean, o.corrupted, o.component, o.metric, how)

    def attribute(self, options: AttributeOptions) -> reports.AttributionReport:
        """Which parts wrote a token's logit, see mlxfun.tracing.lenses.direct."""
        self._own()
        _require_export(options.export)
        if options.export is not None and options.export.suffix == ".svg":
            raise UsageError("an attribution is a list and no map; write .json, .md or .csv")
        found = direct_logit_attribution(
            self.tracer, options.text, options.answer, options.other, options.position
        )
        shares = tuple((s.name, s.logit) for s in found.top_components(len(found.shares)))
        table = [["part", "logit"], *([name, f"{x:.6g}"] for name, x in shares)]
        return reports.AttributionReport(
            found.answer, found.other, found.total, found.unexplained, shares, found.summary(),
            _export(options.export, found, lambda: "", found.to_markdown, table),
        )  # fmt: skip

    # -- data sets --------------------------------------------------------------------------------

    def _samples(self, data: DatasetOptions, ctx: Context) -> list[list[int]]:
        rows = read_sequences(data, self.tokenizer, self.map.vocabulary, ctx.reading())
        return [row.tolist() for row in rows]

    def _made_on(self) -> dict[str, str]:
        side = self.editor.live_state
        return {"state": side, "checkpoint": self.checkpoint_id,
                "steering": self.editor.steering.brief}  # fmt: skip

    def save_activations(
        self, options: ActivationOptions, data: DatasetOptions, ctx: Context = SILENT
    ) -> reports.ActivationsReport:
        """Write activations of a data set to a safetensors file, batch by batch."""
        self._own()
        work = Work(ctx=ctx, made_on=self._made_on())
        rows = self._samples(data, ctx)
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
        sets = {name: self._samples(data, ctx) for name, data in classes.items()}
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
        sets = self._samples(positive, ctx), self._samples(negative, ctx)
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
            raise StateError(
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


def _traced(one: Saved, position: int) -> reports.TracedValue:
    value = one.value
    point, shape = one.point, tuple(value.shape)
    dtype = str(value.dtype).rpartition(".")[2]
    if point.kind == "attention":
        here = value[:, :, position] if shape[2] > position else value
    elif point.kind == "expert":
        here = value
    else:
        here = value[:, position] if value.ndim > 1 and shape[1] > position else value
    if not mx.issubdtype(value.dtype, mx.floating):
        experts = tuple(int(e) for e in np.array(here).reshape(-1)) if point.route else ()
        return reports.TracedValue(one.name, point.path, shape, dtype, None, None, None, experts)
    flat = np.array(here.astype(mx.float32)).reshape(-1)
    if not flat.size:
        return reports.TracedValue(one.name, point.path, shape, dtype, None, None, None)
    figures = float(np.linalg.norm(flat)), float(flat.min()), float(flat.max())
    return reports.TracedValue(one.name, point.path, shape, dtype, *figures)


def _nested(array: Any) -> Any:
    """An array as nested tuples."""
    if array.ndim == 1:
        return tuple(array.tolist())
    return tuple(_nested(row) for row in array)


def _require_export(path: Path | None) -> None:
    if path is not None and path.suffix not in EXPORTS:
        raise UsageError(
            f"{path}: a result is written as {', '.join(EXPORTS)}; choose one of these"
        )


def _export(
    path: Path | None, result: _Result, svg: Any, markdown: Any, table: list[list[str]]
) -> str:
    """Write a result in the form that the suffix says; the path as text, "" for none."""
    if path is None:
        return ""
    match path.suffix:
        case ".svg":
            text = svg()
        case ".md":
            text = markdown()
        case ".json":
            text = result.to_json() + "\n"
        case _:
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(table)
            text = out.getvalue()
    write_text(path, text)
    return str(path)
