"""Looking inside the live side of a session: the commands of mlxfun.tracing, with plain reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import prompt_tokens
from mlxfun.errors import UsageError
from mlxfun.files import write_text, writing
from mlxfun.session.inspection import Inspection
from mlxfun.tracing import reports
from mlxfun.tracing.lenses.difference import PARTS, difference, values_of
from mlxfun.tracing.lenses.direct import direct_logit_attribution
from mlxfun.tracing.lenses.logit_lens import Lens, logit_lens
from mlxfun.tracing.lenses.patterns import (
    AttentionResult,
    attention_patterns,
    figures,
    find_heads,
    thumbnail,
    tiled,
)
from mlxfun.tracing.lenses.tuned import (
    load_lens,
    require_fitting_lens,
)
from mlxfun.tracing.options import (
    EXPORTS,
    PICTURES,
    AttentionOptions,
    AttributeOptions,
    DifferenceOptions,
    LensOptions,
    PatchOptions,
    TraceOptions,
)
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.attribution import attribution_patching
from mlxfun.tracing.patching.path import path_patching
from mlxfun.tracing.patching.plot import Plot
from mlxfun.tracing.patching.result import PatchResult
from mlxfun.tracing.patching.study import Patching
from mlxfun.tracing.prompts import Prompt
from mlxfun.tracing.values import Saved

TOP = 10


class _Result(Protocol):
    """What can be written to a file."""

    def to_json(self) -> str: ...


class Looking(Inspection):
    """Traces, lenses, patching, probes and steering vectors."""

    def trace_values(self, options: TraceOptions) -> reports.TraceReport:
        """Values of one forward over a text, with figures at one position."""
        self._own()
        tracer, position = self.tracer, options.position
        with tracer.trace(self._asked(options.text, options.chat)) as t:
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
        text = self._asked(options.text, options.chat)
        if against in ("checkpoint", "base"):
            if against == "base":
                editor.require_staged("compare with its base")
            with editor.live("candidate" if against == "base" else editor.side):
                after = values_of(tracer, text)
            with editor.live("base" if against == "base" else "checkpoint"):
                before = values_of(tracer, text)
        elif against.isdigit():
            editor.require_unstaged("comparing with a node of the history")
            with editor.unsteered():
                after = values_of(tracer, text)
                with editor.history.excursion(editor.swap):
                    editor.history.goto(int(against), editor.swap)
                    before = values_of(tracer, text)
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
        translate = None
        if options.tuned is not None:
            tuned = load_lens(options.tuned)
            require_fitting_lens(tuned, self.tracer, str(options.tuned))
            translate = tuned.translate
        lens = Lens(options.layers, options.positions, options.top_k, options.answers,
                    translate=translate, ctx=ctx)  # fmt: skip
        found = logit_lens(self.tracer, self._asked(options.text, options.chat), lens)
        rows = [[str(layer), f"{p} {t}", words[0], f"{x[0]:.6g}"]
                for layer, line, chances in zip(found.layers, found.words, found.probabilities, strict=True)
                for p, t, words, x in zip(found.positions, found.tokens, line, chances, strict=True)]  # fmt: skip
        table = [["layer", "position", "word", "probability"], *rows]
        return reports.LensReport(
            found.layers, found.positions, found.tokens, found.words,
            _nested(found.probabilities), found.first_layer(), found.summary(), found.answers,
            _nested(found.answer_ranks), _nested(found.answer_probabilities),
            _nested(found.ids), options.text, options.chat,
            _export(options.export, found, found.drawing, found.to_markdown, table),
        )  # fmt: skip

    def attention(
        self, options: AttentionOptions
    ) -> reports.AttentionReport | reports.HeadMapsReport | reports.HeadsReport:
        """The weights of one head, of all heads of a layer, or heads ranked by a pattern."""
        self._own()
        _require_export(options.export)
        if options.find is not None:
            scores = find_heads(self.tracer, options.find)
            rows = tuple((s.layer, s.head, s.score) for s in scores)
            return reports.HeadsReport(options.find, rows)
        layer, head = options.layer, options.head
        text = self._asked(options.text, options.chat)
        found = attention_patterns(self.tracer, text, [layer])
        if options.every:
            return self._all_heads(found, options)
        heads = found.weights[layer].shape[0]
        if not 0 <= head < heads:
            raise UsageError(f"layer {layer} has no head {head}; it has {heads}, 0 to {heads - 1}")
        looks = tuple(tuple(i for i, _, _ in found.strongest(layer, head, at, 3))
                      for at in range(len(found.tokens)))  # fmt: skip
        weights = found.weights[layer][head]
        table = [["query", "key", "weight"], *([str(q), str(k), f"{weights[q, k]:.6g}"]
                 for q, k in np.ndindex(weights.shape))]  # fmt: skip
        written = _export(options.export, found, lambda: found.drawing(layer, head),
                          lambda: found.to_markdown(layer, head), table)  # fmt: skip
        return reports.AttentionReport(
            layer,
            head,
            heads,
            found.tokens,
            _nested(weights),
            looks,
            options.text,
            options.chat,
            written,
        )

    def _all_heads(
        self, found: AttentionResult, options: AttentionOptions
    ) -> reports.HeadMapsReport:
        layer = options.layer
        maps = [thumbnail(head) for head in found.weights[layer]]
        rows = tuple(figures(head) for head in found.weights[layer])
        head = ["head", *reports.HEAD_FIGURES]
        table = [head, *([str(n), *(f"{x:.6g}" for x in row)] for n, row in enumerate(rows))]
        written = _export(options.export, found, lambda: tiled(maps, layer),
                          lambda: _markdown(table), table)  # fmt: skip
        return reports.HeadMapsReport(
            layer,
            found.tokens,
            rows,
            tuple(map(_nested, maps)),
            options.text,
            options.chat,
            written,
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
            _export(options.export, found, found.drawing, found.to_markdown, table),
        )  # fmt: skip

    def _patched(self, o: PatchOptions, ctx: Context) -> PatchResult:
        if o.other is not None and o.answer is None:
            raise UsageError("another token is compared with an answer: give --answer as well")
        answers = tuple(token for token in (o.answer, o.other) if token is not None)
        how = Patching(answers, o.layers, ctx=ctx)
        prompts = self._asked(o.clean, o.chat), self._asked(o.corrupted, o.chat)
        if o.method == "path":
            return path_patching(self.tracer, prompts, o.component, o.receiver, o.metric, how)
        method = activation_patching if o.method == "activation" else attribution_patching
        return method(self.tracer, *prompts, o.component, o.metric, how)

    def _asked(self, text: str, chat: bool) -> Prompt:
        """A text as it is, or its token ids as a question to the model."""
        if not chat:
            return text
        tokens = prompt_tokens([{"role": "user", "content": text}], self.tokenizer)
        return [int(token) for token in tokens]

    def attribute(self, options: AttributeOptions) -> reports.AttributionReport:
        """Which parts wrote a token's logit, see mlxfun.tracing.lenses.direct."""
        self._own()
        _require_export(options.export)
        if options.export is not None and options.export.suffix in PICTURES:
            raise UsageError("an attribution is a list and no map; write .json, .md or .csv")
        found = direct_logit_attribution(
            self.tracer,
            self._asked(options.text, options.chat),
            options.answer,
            options.other,
            options.position,
        )
        shares = tuple((s.name, s.logit) for s in found.top_components(len(found.shares)))
        table = [["part", "logit"], *([name, f"{x:.6g}"] for name, x in shares)]
        return reports.AttributionReport(
            found.answer, found.other, found.total, found.unexplained, shares, found.summary(),
            _export(options.export, found, None, found.to_markdown, table),
        )  # fmt: skip


def _markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---:|" * len(table[0]), *lines[1:]]) + "\n"


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
    path: Path | None,
    result: _Result,
    drawing: Callable[[], Plot] | None,
    markdown: Any,
    table: list[list[str]],
) -> str:
    """Write a result in the form that the suffix says; the path as text, "" for none."""
    if path is None:
        return ""
    if drawing is not None and path.suffix in (".png", ".pdf"):
        made = drawing().figure(path.suffix)
        with writing(path) as file:
            file.write(made)
        return str(path)
    match path.suffix:
        case ".svg" if drawing is not None:
            text = drawing().svg()
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
