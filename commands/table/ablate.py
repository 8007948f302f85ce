"""`abliterate` and `refusals`: remove a refusal direction from the weights, count refusals."""

from __future__ import annotations

import click

from commands.conditions import whole
from commands.declare import (
    Call,
    Decorator,
    Needed,
    command,
    data_option,
    data_options,
    dataset_options,
    positive,
    stack,
)
from commands.table.to_disk import carry_out, to_disk
from commands.types import FilePath, Number, Whole
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import UsageError
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.report import Report
from mlxfun.techniques.ablate.options import POSITIONS, PROJECTIONS, TARGETS, AblateOptions

DATA = ("text_key", "max_samples", "max_tokens")
MAP = FilePath((".json",))


def _prompts(name: str, what: str) -> Decorator:
    text = f"{what}: file, directory or demo:NAME."
    return data_option(name, text, cls=Needed, unless=("choose",))


prompts = stack(
    _prompts("--harmful", "Prompts that are refused"),
    _prompts("--harmless", "Prompts that are answered"),
    data_options,
    click.option(
        "--answer-tokens",
        type=positive,
        default=100,
        metavar="N",
        help="Judge the first N tokens of an answer (default: 100).",
    ),
)


def _sets(call: Call) -> tuple[DatasetOptions | None, DatasetOptions | None]:
    bench = call.bench
    harmful, harmless = (
        None
        if not call[name]
        else dataset_options(bench.readable_sources(call[name]), call.params, bench.settings.seed)
        for name in ("harmful", "harmless")
    )
    return harmful, harmless


@command("abliterate", group="edit", when=whole)
@prompts
@data_option("--text", "Plain text to leave as it is (default: what the last collect ran).")
@click.option(
    "--projection",
    type=click.Choice(PROJECTIONS),
    default="oblique",
    help="oblique: each part loses its own difference, with the least change to other text. "
    "orthogonal: all lose one direction of the residual stream (Arditi et al.).",
)
@click.option(
    "--directions",
    type=positive,
    default=1,
    metavar="K",
    help="Oblique: split harmful prompts into K groups (default: 1).",
)
@click.option(
    "--layers",
    default="auto",
    metavar="auto|all|A-B",
    help="Orthogonal: layers considered; the first 80 percent (auto), all, or a range.",
)
@click.option(
    "--extraction-position",
    type=click.Choice(POSITIONS),
    help="Orthogonal: last token of a prompt or mean (default: last; a search tries both).",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="all",
    help="What is edited: everything, the experts of --safety-map, all but routed experts.",
)
@click.option("--safety-map", type=MAP, help="safety_report.json, for --target safety-experts.")
@click.option("--allow-stale", is_flag=True, help="Use a map made on another state of the weights.")
@click.option(
    "--strength",
    default="1",
    metavar="S",
    help='1 removes, 2 reverses. Parts: "1,experts=0,attention@2-5=2" (default: 1).',
)
@click.option(
    "--search",
    type=Whole(min=0),
    default=0,
    metavar="N",
    help="Try N sources and strengths for the fewest refusals (default: 0, no search).",
)
@click.option(
    "--max-kl",
    type=Number(min=0, min_open=True),
    default=0.1,
    metavar="X",
    help="Bound on a search's first-token KL on harmless prompts (default: 0.1).",
)
@click.option(
    "--max-perplexity",
    type=Number(min=1, min_open=True),
    default=1.01,
    metavar="X",
    help="Bound on a search's perplexity of plain text, times what it was (default: 1.01).",
)
@click.option(
    "--choose",
    type=Whole(min=0),
    metavar="K",
    help="Stage point K of the last search's front instead.",
)
@to_disk
def abliterate(call: Call) -> Report:
    """Stage an ablation: project what separates harmful from harmless prompts out of the weights.

    It is found where the answer begins, and removed from what attention, dense parts, shared and
    routed experts write to the residual stream. Part of the prompts is kept back: the report counts
    refusals on those. --search finds how strongly to remove it, and shows refusals against KL and
    perplexity; --choose stages another point of that front.
    """
    values = {
        name: call[name]
        for name in (
            "layers", "extraction_position", "target", "strength", "search", "max_kl", "choose",
            "answer_tokens", "allow_stale", "projection", "directions", "max_perplexity",
        )
    }  # fmt: skip
    path = call["safety_map"]
    values["safety_map"] = None if path is None else call.bench.readable(path)
    values["seed"] = call.bench.settings.seed if call["seed"] is None else call["seed"]
    if call["text"]:
        sources = call.bench.readable_sources(call["text"])
        values["text"] = dataset_options(sources, call.params, values["seed"])
    harmful, harmless = _sets(call)
    if values["choose"] is not None and (harmful or harmless or values["search"]):
        raise UsageError("--choose takes its prompts and directions from the last search; leave "
                         "out --harmful, --harmless and --search")  # fmt: skip
    return carry_out(call, AblateOptions(harmful, harmless, **values), call.session.abliterate)


@command("refusals", group="measure")
@prompts
def refusals(call: Call) -> Report:
    """Count refusals of harmful and harmless prompts, by rule, before and after.

    Of the staged plan beside the current weights; with nothing staged, of those beside the
    checkpoint. Answers are greedy. An answer is a refusal if its opening, after any thinking, has
    one of a list of phrases; an empty one is none.
    """
    harmful, harmless = _sets(call)
    if harmful is None or harmless is None:
        raise UsageError("refusals: give both --harmful and --harmless, for instance demo:harmful")
    options = RefusalOptions(harmful, harmless, call["answer_tokens"])
    return call.session.refusals(options, call.ctx)


COMMANDS = (abliterate, refusals)
