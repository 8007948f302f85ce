"""Greedy answers to the first prompts of the evaluation sets, shown beside the figures."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Line, Tokenizer, prompt_tokens, read_lines
from mlxfun.data.lines import BrokenLines
from mlxfun.data.rendered import as_rendered, asked_ids
from mlxfun.editing.editor import Editor
from mlxfun.evaluation.answer_health import AnswerHealth, health
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import Sample
from mlxfun.generation.answers import Greedy
from mlxfun.generation.decoder import Decoder, advance
from mlxfun.generation.options import GenerateOptions
from mlxfun.tally import Tally

PROMPT_TOKENS = 32
"""How much of a plain text a sample continues."""


def answer_samples(
    decoder: Decoder,
    editor: Editor,
    options: EvaluateOptions,
    sets: Sequence[EvalSet],
    ctx: Context = SILENT,
) -> tuple[Sample, ...]:
    """Greedy answers of the live side to the first prompts of the data sets.

    No other job takes a turn between their tokens: what steers now must not meet a borrowed side,
    nor change a measurement half-way.
    """
    out: list[Sample] = []
    count = max(options.samples, 0)
    asked = _prompts(options, sets, decoder.tokenizer, count)[:count]
    for prompt, text in asked:
        ctx.check()
        ctx.progress("answering samples", len(out), len(asked), "samples")
        steps = decoder.steps(
            prompt,
            GenerateOptions(max_tokens=options.sample_tokens),
            editor.key,
            lambda *_: None,
            ctx=ctx,
        )
        while (decoded := advance(steps)) is None:
            pass
        out.append(Sample(text, decoded.text))
    if asked:
        ctx.progress("answering samples", len(out), len(asked), "samples")
    return tuple(out)


def answer_health(
    model: nn.Module,
    tokenizer: Tokenizer,
    options: EvaluateOptions,
    sets: Sequence[EvalSet],
    ctx: Context = SILENT,
) -> AnswerHealth:
    """Figures of the live side's greedy answers to the first `options.answers` prompts."""
    asked = _prompts(options, sets, tokenizer, options.answers)
    prompts = [np.array(tokens, dtype=np.int32) for tokens, _ in asked[: options.answers]]
    answering = Greedy(model, tokenizer, shared=True)
    found = answering(prompts, options.answer_tokens, ctx, "judging answers")
    return health([answer.tokens for answer in found], frozenset(tokenizer.eos_token_ids))


def _prompts(
    options: EvaluateOptions, sets: Sequence[EvalSet], tokenizer: Tokenizer, count: int
) -> list[tuple[list[int], str]]:
    if count <= 0:
        return []
    if options.datasets:
        lines = [line for data in options.datasets for line in read_lines(data)]
        found: list[tuple[list[int], str]] = []
        broken = BrokenLines(Tally())  # counted where the sets were read for measuring
        for line in lines[:count]:
            with broken.counted(line.source):
                found.append(_prompt(as_rendered(line, tokenizer), tokenizer))
        return found
    heads = [s[:PROMPT_TOKENS].tolist() for data in sets for s in data.sequences]
    return [(head, tokenizer.decode(head)) for head in heads]


def _prompt(line: Line, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """A chat line up to its first user turn, or the beginning of a text."""
    if line.kind == "rendered":
        return asked_ids(line, tokenizer), str(line.payload[0])
    messages = line.messages
    if messages is None:
        head = tokenizer.encode(line.text)[:PROMPT_TOKENS]
        return list(head), tokenizer.decode(head)
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    asked = messages[: first + 1]
    return prompt_tokens(asked, tokenizer, None, line.tools, line.where).tolist(), str(
        asked[-1]["content"]
    )
