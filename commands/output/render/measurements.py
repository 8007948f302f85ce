"""Renderers of perplexity, KL, compared states and refusals."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType

from commands.output.render.base import experts_text, new_table, pairs, text, with_notes
from mlxfun.evaluation.answer_health import AnswerHealth
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, RefusalReport
from mlxfun.evaluation.task_options import TaskReport
from mlxfun.text import readable_bytes


def tasks(report: TaskReport) -> RenderableType:
    """Every metric of every task, with its standard error."""
    names = ("value", "+-", "documents")
    table = new_table("task", "metric", *names, numbers=names)
    for row in report.rows:
        error = "" if row.error is None else f"{row.error:.4f}"
        cells = (f"{row.value:.4f}", error, str(row.documents))
        table.add_row(text(row.task), text(row.metric), *cells)
    return Group(text(report.summary()), table)


def evaluate(report: EvaluateReport) -> RenderableType:
    """Perplexity by data set, then sample answers."""
    # Narrow titles and two decimals: the table has to fit beside the heatmap.
    names = ("ppl", "95%", "ratio", "tokens")
    table = new_table("data set", *names, numbers=names)
    rows = dict(report.perplexity)
    if len(rows) == 2:
        rows.pop("all", None)  # of one set it would be the same again
    for name, value in rows.items():
        low, high = report.interval.get(name, (math.nan, math.nan))
        base = report.baseline.get(name)
        tokens = report.tokens if name == "all" else report.tokens_per_set.get(name)
        table.add_row(
            text(name),
            f"{value:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{value / base:.3f}" if base else "",
            f"{tokens:,}" if tokens is not None else "",
        )
    parts: list[RenderableType] = [text(report.summary()), table]
    if report.answers is not None and report.answers_before is not None:
        parts.append(_answers(report.answers, report.answers_before))
    for sample in report.samples:
        parts += [text(f"> {sample.prompt}", "dim"), text(sample.text)]
    kept = report.subject == "current"
    steered = "steering is no part of the weights: " + (
        "the history keeps no score of this" if kept else "guardrails of apply measure without it"
    )
    return with_notes(Group(*parts), (steered,) if report.steered else ())


def _answers(now: AnswerHealth, before: AnswerHealth) -> RenderableType:
    """Figures of judged answers, of the subject and of the checkpoint."""
    table = new_table(
        f"of {now.answers} answers", "now", "checkpoint", numbers=("now", "checkpoint")
    )
    for name, pick in (
        ("loops", lambda h: f"{h.loops:.1%}"),
        ("ended by themselves", lambda h: f"{h.ended:.1%}"),
        ("mean tokens", lambda h: f"{h.tokens:.1f}"),
        ("repeated 4-grams", lambda h: f"{h.repetition:.1%}"),
    ):
        table.add_row(name, pick(now), pick(before))
    return table


def compare(report: CompareReport) -> RenderableType:
    """Figures of two states, a column for each, and the experts that differ."""
    # One column per state: it fits a narrow panel, and figures to compare are side by side.
    both = (report.a, report.b)
    table = new_table("")
    for f in both:
        table.add_column(text(f"{f.node} {f.name}"))
    lines: tuple[tuple[str, list[str]], ...] = (
        ("perplexity", [f"{f.perplexity:.3f}" for f in both]),
        ("x checkpoint", [f"{f.ratio:.3f}" for f in both]),
        ("KL", ["" if f.kl_mean is None else f"{f.kl_mean:.4f}" for f in both]),
        ("size", [readable_bytes(f.bytes) for f in both]),
        *((("experts", [str(f.experts) for f in both]),) if report.a.experts else ()),
        ("work kept", ["" if f.work is None else f"{f.work:.1%}" for f in both]),
    )
    for name, cells in lines:
        table.add_row(name, *cells)
    rows: list[tuple[str, Any]] = []
    for node, sets in ((report.a.node, report.only_a), (report.b.node, report.only_b)):
        rows += [(f"only in {node}, layer {ly}", experts_text(e)) for ly, e in sets.items()]
    parts: list[RenderableType] = [text(report.summary()), table, pairs(rows)]
    for one, other in zip(report.a.samples, report.b.samples, strict=False):
        parts += [text(f"> {one.prompt}", "dim"), text(f"{report.a.node}: {one.text}")]
        parts.append(text(f"{report.b.node}: {other.text}"))
    return Group(*parts)


def refusals(report: RefusalReport) -> RenderableType:
    """Refusals before and after, with examples."""
    table = new_table("", "harmful refused", "harmless refused")
    for name, count in ((report.reference, report.before), (report.subject, report.after)):
        harmful = f"{count.harmful} of {count.of_harmful}"
        table.add_row(name, harmful, f"{count.harmless} of {count.of_harmless}")
    parts: list[RenderableType] = [text(report.summary()), table]
    for prompt, before, after in report.examples:
        shown = (f"> {prompt}", "dim"), (f"{report.reference}: {before}", "")
        parts += [text(*line) for line in (*shown, (f"{report.subject}: {after}", ""))]
    return with_notes(Group(*parts), report.notices)
