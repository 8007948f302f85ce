"""`amplify` and `bake`: permanent router edits from a domain report or from active steering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from commands.conditions import steered, with_experts
from commands.declare import Call, command, data_option, data_options, dataset_options, stack
from commands.types import FilePath, Number, Rise
from mlxfun.data.options import DatasetOptions
from mlxfun.report import Report
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions

text_options = stack(
    data_option(
        "--dataset",
        "Text that boosts are fitted on, for routers without a bias (default: the last one).",
    ),
    data_options,
)


@contextmanager
def _text(call: Call) -> Iterator[DatasetOptions | None]:
    """The calibration text, None if none was ever named: not every router needs it."""
    if not call["dataset"] and call.bench.settings.dataset is None:
        yield None
        return
    with call.bench.dataset(call["dataset"]) as sources:
        yield dataset_options(sources, call.params, call.bench.settings.seed)


@command("amplify", group="edit", when=with_experts)
@click.option(
    "--domain-map",
    type=FilePath((".json",)),
    required=True,
    help="domain_report.json of a domain scan.",
)
@click.option(
    "--scale",
    type=Number(0, 100, min_open=True),
    metavar="X",
    help="Boost of an expert with composite score 1 (default: 0.1 with a selection bias, else 0.5).",
)
@click.option(
    "--share",
    type=Rise(),
    metavar="+N%",
    help="Find the scale at which these experts' share of routed choices rises by N % on --dataset.",
)
@click.option(
    "--threshold",
    type=Number(0, 1, max_open=True),
    default=0.0,
    metavar="C",
    help="Composite score at which boosts begin (default: 0).",
)
@text_options
@click.option("--allow-stale", is_flag=True, help="Use a map made on another state of the weights.")
def amplify(call: Call) -> Report:
    """Stage a boost of a domain's experts: scale x (composite score - threshold), in the routers.

    Exact where a router has a bias; a selection bias is compared with scores from 0 to 1, so small
    scales do there. Elsewhere the boost is folded into the router's rows by least squares, and the
    report says how much of it tokens get. With --share the scale is found: the least one that
    raises the share as asked, which of all that do moves the model least.
    """
    domain_map = call.bench.readable(call["domain_map"])
    rule = call["scale"], call["threshold"], call["share"], call["allow_stale"]
    with _text(call) as data:
        return call.session.amplify(AmplifyOptions(domain_map, data, *rule), call.ctx)


@command("bake", group="edit", when=steered)
@text_options
def bake(call: Call) -> Report:
    """Stage what the steering does as a permanent edit; applying it ends the steering.

    Steered experts go into the routers. A router with a selection bias holds any steering exactly.
    Others hold what is constant: the additive rule, and deactivation; the report says how well.
    Steering vectors and features that are added go into biases, where what writes the value has one
    that reaches it unchanged: that is tried out, and what would not be exact is refused.
    """
    with _text(call) as data:
        return call.session.bake(BakeOptions(data), call.ctx)


COMMANDS = (amplify, bake)
