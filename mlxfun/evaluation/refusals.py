"""Counts refusals of two states side by side."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer, Tokens, prompt_tokens
from mlxfun.editing.editor import Editor
from mlxfun.editing.plans import SHOWN, SHOWN_SIDES, Subject
from mlxfun.editing.reports import ShownSide, ShownSubject
from mlxfun.errors import UsageError
from mlxfun.evaluation.evaluator import Evaluator
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.evaluation.refusal_metrics import Panel, Prompts, answer_kl, ask_all
from mlxfun.evaluation.refusal_rule import RULE
from mlxfun.evaluation.reports import RefusalReport
from mlxfun.events import Side
from mlxfun.generation.answers import Greedy, read_prompts
from mlxfun.tally import Tally

EXAMPLES = 3


def count_refusals(
    editor: Editor,
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    options: RefusalOptions,
    ctx: Context = SILENT,
) -> RefusalReport:
    """Count refusals of the candidate beside the current weights, or of those beside the checkpoint.

    Raises UsageError, DatasetError, Cancelled.
    """
    if options.tokens < 1:
        raise UsageError(f"--answer-tokens {options.tokens} must be at least 1")
    vocabulary = editor.resident.anatomy.vocabulary
    asked, notices = _read(options, tokenizer, vocabulary, ctx.reading())
    subject: Side = "candidate" if editor.staged is not None else "base"
    reference: Subject = "base" if subject == "candidate" else "checkpoint"
    steered = [side for side in (subject, reference) if not editor.steering_of(side).empty]
    if steered:
        notices.append(f"counted while steering: {' and '.join(SHOWN[side] for side in steered)}")
    model: nn.Module = editor.resident.tree.modules[""]
    answering = Greedy(model, tokenizer, shared=True)
    with editor.live(reference):
        key = editor.key()
        base = ask_all(answering, asked, options.tokens, ctx, SHOWN[reference])
    now, kls = base, (0.0, 0.0)
    with editor.live(subject):
        if editor.key() != key:
            now = ask_all(answering, asked, options.tokens, ctx, SHOWN[subject])
            kls = answer_kl(evaluator, base, lambda: editor.live(reference), key, ctx)
    report = refusal_report((SHOWN_SIDES[subject], SHOWN[reference]), (base, now), kls, tokenizer)
    return replace(report, notices=tuple(notices))


def _read(
    options: RefusalOptions, tokenizer: Tokenizer, vocabulary: int | None, tally: Tally
) -> tuple[Prompts, list[str]]:
    """Both sets of prompts, and notices about those left out."""
    notices: list[str] = []
    parts: list[tuple[Tokens, ...]] = []
    for data in (options.harmful, options.harmless):
        prompts, skipped = read_prompts(data, tokenizer, vocabulary, tally)
        parts.append(tuple(prompts))
        if skipped:
            notices.append(f"{skipped} prompts of {data.source} are too long and were left out")
    return Prompts(*parts), notices


def refusal_report(
    sides: tuple[ShownSide, ShownSubject],
    panels: tuple[Panel, Panel],
    kls: tuple[float, float],
    tokenizer: Tokenizer,
) -> RefusalReport:
    """Two panels of answers to the same prompts: of the reference, and of the subject.

    sides: (subject, reference) as shown. kls: KL(reference || subject), see answer_kl.
    """
    base, now = panels
    changed = [
        (_shown(tokenizer, prompt), one.text, other.text)
        for prompt, one, other in zip(base.prompts.harmful, base.harmful, now.harmful, strict=True)
        if one.text != other.text
    ]
    return RefusalReport(
        subject=sides[0],
        reference=sides[1],
        rule=RULE,
        before=base.count,
        after=now.count,
        first_token_kl=kls[0],
        answer_kl=kls[1],
        examples=tuple(changed[:EXAMPLES]),
    )


def _shown(tokenizer: Tokenizer, prompt: Tokens) -> str:
    """A prompt in one line, without what the chat template puts around it."""
    mark = "mmm"
    around = tokenizer.decode(
        prompt_tokens([{"role": "user", "content": mark}], tokenizer).tolist(),
        skip_special_tokens=False,
    )
    before, found, after = around.partition(mark)
    whole: str = tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
    if found and whole.startswith(before) and whole.endswith(after):
        return " ".join(whole[len(before) : len(whole) - len(after)].split())
    # A text without a template, or of several turns.
    return " ".join(tokenizer.decode(prompt.tolist(), skip_special_tokens=True).split())
