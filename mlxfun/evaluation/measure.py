"""Evaluation reports: current model and candidate, against the checkpoint and each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer, read_sequences
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.editor import Editor
from mlxfun.editing.options import ApplyOptions
from mlxfun.editing.plans import SHOWN_SIDES, Subject
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluation.evaluator import (
    Comparison,
    EvalSet,
    Evaluator,
    Likelihood,
    Live,
    Reference,
    StateKey,
)
from mlxfun.evaluation.figures import identical, iterate_sets, joined, kl_figures, perplexity
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import EvaluateReport, Sample
from mlxfun.events import Side

Sampler = Callable[[], tuple[Sample, ...]]


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure. sampler: makes the sample answers.

    kl: compare the token distributions with the references' as well; without it perplexity alone is
    measured, and no reference but the checkpoint is run.
    """

    subject: Side
    sets: Sequence[EvalSet]
    sampler: Sampler = tuple
    kl: bool = True


def measure(
    editor: Editor, evaluator: Evaluator, request: Request, ctx: Context = SILENT
) -> EvaluateReport:
    """Measure the subject of `request`.

    Reference passes come first, from the cache where possible; then one pass of the subject.
    """
    sets = tuple(iterate_sets(request.sets))
    sides = _references(editor, request.subject) if request.kl else ()
    lanes = _unmeasured(editor, evaluator, (*sides[1:], request.subject), sets)
    with evaluator.reading_once(sets, lanes, ctx):
        return _measured(editor, evaluator, request, sets, sides, ctx)


def _unmeasured(
    editor: Editor,
    evaluator: Evaluator,
    sides: Sequence[Subject],
    sets: Sequence[EvalSet],
) -> dict[StateKey, Live]:
    """The states that have to be run, and what makes each live."""
    found: dict[StateKey, Live] = {}
    for side in ("checkpoint", *sides):
        with editor.live(side):
            key = editor.key()
        known = all(evaluator.has_reference(key, data) for data in sets)
        if not known:
            found[key] = _again(editor, side)
    return found


def _measured(
    editor: Editor,
    evaluator: Evaluator,
    request: Request,
    sets: Sequence[EvalSet],
    sides: Sequence[Subject],
    ctx: Context,
) -> EvaluateReport:
    subject = request.subject
    references = {
        side: [_reference(editor, evaluator, side, data, ctx) for data in sets]
        for side in ("checkpoint", *sides[1:])  # the checkpoint's perplexity is the baseline
    }
    subject_losses: list[Likelihood] = []
    compared: dict[Subject, list[Comparison]] = {side: [] for side in sides}
    with editor.live(subject):
        for number, data in enumerate(sets):
            if editor.key() == (editor.root_state, ""):
                # The subject is the checkpoint: its reference pass has measured it already.
                same = references["checkpoint"][number].likelihood
                subject_losses.append(same)
                for side in sides:
                    compared[side].append(identical(same))
                continue
            likelihood, comparisons = evaluator.compare(
                data,
                [references[side][number] for side in sides],
                [_again(editor, side) for side in sides],
                ctx,
                editor.key(),
            )
            subject_losses.append(likelihood)
            for side, comparison in zip(sides, comparisons, strict=True):
                compared[side].append(comparison)
        samples = request.sampler()
        state = editor.live_state
    against = {side: kl_figures(parts) for side, parts in compared.items()}
    checkpoint = against.get("checkpoint", {})
    return EvaluateReport(
        subject=SHOWN_SIDES[subject],
        measured_state=state,
        datasets=tuple(data.name for data in sets),
        **_perplexities(sets, subject_losses, [r.likelihood for r in references["checkpoint"]]),
        kl_mean=checkpoint.get("kl_mean"),
        kl_p99=checkpoint.get("kl_p99"),
        top1_agreement=checkpoint.get("top1_agreement"),
        vs_current=against.get("base"),
        samples=samples,
        steered=not editor.steering_of(subject).empty,
    )


def read_set(
    data: DatasetOptions, tokenizer: Tokenizer, vocabulary: int | None, ctx: Context = SILENT
) -> EvalSet:
    """One set, as tokens. Raises DatasetError."""
    sequences = read_sequences(data, tokenizer, vocabulary, ctx.reading())
    return EvalSet(data.source, tuple(sequences))


def eval_sets(
    options: EvaluateOptions,
    tokenizer: Tokenizer,
    vocabulary: int | None,
    held_out: EvalSet | None,
    ctx: Context = SILENT,
) -> list[EvalSet]:
    """The sets that the options name, or what calibration held out. Raises UsageError, DatasetError."""
    sets = [read_set(data, tokenizer, vocabulary, ctx) for data in options.datasets]
    if sets:
        return sets
    if held_out is None:
        raise UsageError(
            "no data set named and no held-out samples at hand; give --dataset, or collect "
            "from a set with more samples than --max-samples"
        )
    return [held_out]


def scores(report: EvaluateReport) -> dict[str, float]:
    """What the history keeps of a measurement: nothing of a steered one, since a node stands for
    weights and steering is no part of them."""
    if report.steered:
        return {}
    found = {"perplexity": report.perplexity["all"]}
    if report.kl_mean is not None:
        found["kl_mean"] = report.kl_mean
    return found


def _references(editor: Editor, subject: Side) -> tuple[Subject, ...]:
    """What the subject is compared with: the checkpoint always, the base if it differs."""
    changed = (editor.state, editor.steering_of("base").key) != (editor.root_state, "")
    return ("checkpoint", "base") if subject == "candidate" and changed else ("checkpoint",)


def _reference(
    editor: Editor, evaluator: Evaluator, side: Subject, data: EvalSet, ctx: Context
) -> Reference:
    state = editor.root_state if side == "checkpoint" else editor.state
    key = state, editor.steering_of(side).key
    if evaluator.has_reference(key, data):
        return evaluator.reference(key, data)
    with editor.live(side):
        return evaluator.reference(editor.key(), data, ctx)


def _again(editor: Editor, side: Subject) -> Callable[[], AbstractContextManager[None]]:
    return lambda: editor.live(side)


def _perplexities(
    sets: Sequence[EvalSet], subject: list[Likelihood], base: list[Likelihood]
) -> dict[str, Any]:
    names = [*(data.name for data in sets), "all"]
    measured = [perplexity(part) for part in (*subject, joined(subject))]
    baseline = [perplexity(part)[0] for part in (*base, joined(base))]
    sizes = [int(part.nll.size) for part in subject]
    return {
        "perplexity": {n: value for n, (value, _) in zip(names, measured, strict=True)},
        "interval": {n: interval for n, (_, interval) in zip(names, measured, strict=True)},
        "baseline": dict(zip(names, baseline, strict=True)),
        "tokens": sum(sizes),
        "tokens_per_set": dict(zip(names, sizes, strict=False)),
    }


def require_within(report: EvaluateReport, options: ApplyOptions) -> None:
    """Raise StateError with the figures when a preview breaks a guardrail."""
    broken = []
    if options.max_kl is not None:
        if report.kl_mean is None:
            raise StateError("the preview measured no KL; preview again with KL to use --max-kl")
        if not report.kl_mean <= options.max_kl:
            broken.append(f"mean KL {report.kl_mean:.4f} is above --max-kl {options.max_kl:g}")
    limit = options.max_perplexity_ratio
    if limit is not None and not report.ratio <= limit:
        broken.append(
            f"perplexity {report.perplexity['all']:.3f} is {report.ratio:.3f}x the checkpoint's "
            f"{report.baseline['all']:.3f}, above --max-perplexity-ratio {limit:g}"
        )
    if options.max_loops is not None:
        if report.answers is None or report.answers_before is None:
            raise StateError("the preview judged no answers; preview with --answers N first")
        more = report.answers.loops - report.answers_before.loops
        if not more <= options.max_loops:
            broken.append(
                f"{report.answers.loops:.1%} of the answers go round in circles, the checkpoint's "
                f"{report.answers_before.loops:.1%}: more than --max-loops {options.max_loops:g} above"
            )
    if broken:
        raise StateError("not applied: " + "; ".join(broken) + "; the plan is still staged")
