"""`evaluate` and `preview`: measure the current model, and the candidate."""

from __future__ import annotations

import click

from commands.conditions import staged
from commands.declare import (
    DATASET,
    Call,
    command,
    count_option,
    data_options,
    dataset_options,
    stack,
)
from mlxfun.errors import UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.report import Report

measure_options = stack(
    click.option(
        "--dataset",
        type=DATASET,
        multiple=True,
        help="What to measure on; repeatable (default: the held-out part of the calibration set).",
    ),
    data_options,
    click.option("--no-kl", is_flag=True, help="Perplexity alone, without the comparison."),
    count_option("--samples", "Show N sample answers", 0, least=0),
    count_option("--sample-tokens", "Longest sample answer", 48),
    count_option(
        "--answers", "Judge N greedy answers for loops, natural ends and repetition", 0, least=0
    ),
    count_option("--answer-tokens", "Longest judged answer", 256),
)


def options(call: Call) -> EvaluateOptions:
    """The `measure_options` of a command."""
    sources = call.bench.readable_sources(call["dataset"])
    weighted = next((source for source, weight in sources if weight is not None), None)
    if weighted is not None:
        raise UsageError(
            f"{weighted}: each data set is measured by itself, so leave its weight out"
        )
    seed = call.bench.settings.seed
    return EvaluateOptions(
        datasets=tuple(dataset_options((s,), call.params, seed) for s in sources),
        kl=not call["no_kl"],
        samples=call["samples"],
        sample_tokens=call["sample_tokens"],
        answers=call["answers"],
        answer_tokens=call["answer_tokens"],
    )


@command("evaluate", group="measure", key="e")
@measure_options
def evaluate(call: Call) -> Report:
    """Measure the applied model: perplexity, KL and top-1 agreement with the checkpoint."""
    return call.session.evaluate(options(call), call.ctx)


@command("preview", group="measure", key="v", when=staged)
@measure_options
def preview(call: Call) -> Report:
    """Measure the staged model before deciding; the same figures evaluate gives after apply."""
    return call.session.preview(options(call), call.ctx)


COMMANDS = (evaluate, preview)
