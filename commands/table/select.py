"""Manual selection of experts to prune: `select`, `probe`, `dossier`, `topics`."""

from __future__ import annotations

import click

from commands.conditions import selectable, staged, with_experts
from commands.declare import Call, Decorator, command, data_option, positive, stack
from commands.types import ExpertPairs, Number, OneExpert, Whole
from mlxfun.calibration.options import METRICS
from mlxfun.data.options import mixed
from mlxfun.errors import UsageError
from mlxfun.evaluation.options import DOSSIER_TOKENS, PROBE_TOKENS, TOPIC_TOKENS, ProbeOptions
from mlxfun.report import Report
from mlxfun.techniques.prune.options import SelectOptions


@command("select", group="edit", when=selectable)
@click.option("--drop", type=ExpertPairs(), metavar="L:E,...", help="Prune these too.")
@click.option("--keep", type=ExpertPairs(), metavar="L:E,...", help="These stay after all.")
@click.option("--clear", is_flag=True, help="Start from nothing, not from the staged plan.")
@click.option(
    "--below",
    type=Number(0, 1),
    metavar="X",
    help="Prune all with less than this share of their layer's metric: 0.01 is one percent.",
)
@click.option("--even", is_flag=True, help="Fill up by score until all layers lose the same.")
@click.option(
    "--n-prune",
    type=positive,
    metavar="N",
    help="Prune N per layer: add the lowest, or keep the highest.",
)
@click.option(
    "--metric", type=click.Choice(METRICS), help="What to rank by (default: reap_sum, see set)."
)
@click.option("--allow-stale", is_flag=True, help="Go by statistics of another state.")
def select(call: Call) -> Report:
    """Select by hand the experts to prune, for instance select --drop 3:7,5:0..2 --keep 3:1.

    It changes the staged prune, or begins one. A selection that takes more experts from one layer
    than from another can be previewed and talked to, but not applied: stock loading holds one
    number for all layers. --even fills the others up by score.
    """
    values = dict(call.params)
    for name in ("drop", "keep"):
        values[name] = values[name] or {}
    values["metric"] = values["metric"] or call.bench.settings.metric
    options = SelectOptions(**values)
    if options == SelectOptions(metric=options.metric, allow_stale=options.allow_stale):
        raise UsageError(
            "select: give --drop L:E, --keep L:E, --below X, --n-prune N or --even, or --clear to "
            "select no experts"
        )
    return call.session.select(options)


def text_options(what: str, tokens: int) -> Decorator:
    """Options for a small text. what: its use, for the help. tokens: the default number."""
    return stack(
        data_option("--dataset", f"{what} (default: held-out calibration samples)."),
        click.option(
            "--tokens",
            type=Whole(min=16),
            default=tokens,
            metavar="N",
            help=f"How many tokens (default: {tokens}).",
        ),
    )


def _text(call: Call) -> ProbeOptions:
    """The `text_options` of a command."""
    sources = call["dataset"]
    data = mixed(call.bench.readable_sources(sources)) if sources else None
    return ProbeOptions(data, call["tokens"])


@command("probe", group="measure", when=staged, recorded=False)
@text_options("What to probe on", PROBE_TOKENS)
def probe(call: Call) -> Report:
    """Measure the staged model quickly, on few tokens; preview is the thorough way.

    It changes nothing: guardrails of apply still ask for a preview.
    """
    return call.session.probe(_text(call), call.ctx)


@command("dossier", group="observe", when=with_experts, read_only=True)
@click.argument("cell", type=OneExpert(), metavar="L:E")
@text_options("Text to watch it on", DOSSIER_TOKENS)
def dossier(call: Call) -> Report:
    """Show one expert in detail: its scores, its tokens, and the expert most similar to it."""
    layer, expert = call["cell"]
    return call.session.dossier(layer, expert, _text(call), call.ctx)


@command("topics", group="observe", when=with_experts)
@text_options("Text to watch the experts on", TOPIC_TOKENS)
@click.option("--known", is_flag=True, help="Run nothing: list what is known already.")
def topics(call: Call) -> Report:
    """Find what each expert serves: a word or two, from one pass over a text and from scans.

    An expert is said to serve numbers, brackets, Cyrillic letters or a frequent word where it
    serves them more than other tokens, beyond chance (q <= 0.01 over everything looked at), and
    where they are a good part of what it serves; a domain scan names the experts that it flags.
    Most experts have no topic. The screen shows topics; export topics writes them to a file.
    """
    if call["known"]:
        return call.session.topics()
    return call.session.find_topics(_text(call), call.ctx)


COMMANDS = (select, probe, dossier, topics)
