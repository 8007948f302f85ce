"""`narrow`: fewer neurons in every expert."""

from __future__ import annotations

import click

from commands.conditions import whole_experts
from commands.declare import (
    DATA_NAMES,
    Call,
    command,
    data_option,
    data_options,
    positive,
)
from commands.table.to_disk import to_disk, with_text, without
from commands.types import Number, SavedSize
from mlxfun.report import Report
from mlxfun.techniques.narrow.options import METHODS, NarrowOptions


@command("narrow", group="edit", when=whole_experts)
@click.option("--width", type=positive, metavar="W", help="Neurons that each expert keeps.")
@click.option(
    "--fraction",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Or the share of its neurons that is taken out, e.g. 0.25.",
)
@click.option(
    "--to-bytes",
    type=SavedSize(),
    metavar="SIZE",
    help="Or what the saved model may take, e.g. 12GB.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="obs",
    help="Which neurons stay: by optimal brain surgeon, or by mean or rms activation (default: obs).",
)
@click.option(
    "--refit/--no-refit",
    default=True,
    help="Fit the output projections to what each layer put out before (default: on).",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Of packed experts, choose single neurons, refit, and pack the output projections anew.",
)
@click.option(
    "--shared",
    is_flag=True,
    help="Take the same fraction of neurons out of the shared experts too.",
)
@click.option("--dense", is_flag=True, help="And out of the MLPs of layers without experts.")
@data_option("--dataset", "Text to judge and refit on (default: that of the last collect).")
@data_options
@to_disk
def narrow(call: Call) -> Report:
    """Stage narrower experts: neurons are removed from every expert, the rest is refitted.

    All experts stay, with one width for all layers, so stock mlx-lm loads the result. At equal size
    this loses less than pruning whole experts. Packed experts lose whole groups of neurons unless
    --requantize is given.
    """
    values = {name: v for name, v in without(call.params).items() if name not in DATA_NAMES}
    return with_text(call, lambda data: NarrowOptions(**values, data=data), call.session.narrow)


COMMANDS = (narrow,)
