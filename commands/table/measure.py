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
    positive,
    stack,
)
from commands.types import FilePath, Whole, Words
from mlxfun.errors import UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.task_options import TaskOptions
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


@command("tasks", group="measure", read_only=True)
@click.argument("names", nargs=-1, required=True, type=Words())
@click.option(
    "--include",
    type=FilePath(),
    metavar="DIR",
    help="A directory with task files of your own.",
)
@click.option("--limit", type=positive, metavar="N", help="Documents of each task (default: all).")
@click.option(
    "--shots",
    type=Whole(0),
    metavar="N",
    help="Examples ahead of each question (default: what the task says).",
)
@click.option("--as-chat", is_flag=True, help="Questions go through the chat template.")
@click.option(
    "--max-tokens", type=positive, metavar="N", help="Longest answer (default: what the task says)."
)
@click.option(
    "--batch", type=positive, default=8, metavar="N", help="Answers decoded at once (default: 8)."
)
def tasks(call: Call) -> Report:
    """Score the live side in tasks of lm-evaluation-harness, e.g. tasks arc_easy --limit 200.

    Needs the extra eval (pip install 'mlxfun[eval]'). What is live is scored, a staged plan and the
    steering included: flip and ask again to compare. Most tasks fetch their data from the Hub.
    """
    include = call["include"]
    return call.session.tasks(
        TaskOptions(
            names=tuple(call["names"]),
            include=None if include is None else call.bench.readable(include),
            limit=call["limit"],
            shots=call["shots"],
            as_chat=call["as_chat"],
            max_tokens=call["max_tokens"],
            batch=call["batch"],
            seed=call.bench.settings.seed,
        ),
        call.ctx,
    )


COMMANDS = (evaluate, preview, tasks)
