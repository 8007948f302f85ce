"""`distil`: train routers, or routers and experts, to predict what the checkpoint does."""

from __future__ import annotations

import click

from commands.conditions import edited_experts
from commands.declare import (
    DATA_NAMES,
    Call,
    command,
    data_option,
    data_options,
    positive,
)
from commands.table.to_disk import to_disk, with_text, without
from commands.types import Number
from mlxfun.report import Report
from mlxfun.techniques.distil.options import TRAINED, DistilOptions


@command("distil", group="edit", when=edited_experts)
@click.option(
    "--train",
    type=click.Choice(TRAINED),
    default="router",
    help="The routers, or routers, norms and experts of a model that is not packed "
    "(default: router).",
)
@click.option(
    "--local",
    is_flag=True,
    help="Fit routers layer by layer to what the checkpoint's experts put out: quicker, and "
    "without a gradient through the model.",
)
@click.option(
    "--passes", type=positive, default=3, metavar="N", help="Passes over the text (default: 3)."
)
@click.option(
    "--rate",
    type=Number(0, 1, min_open=True),
    metavar="R",
    help="Adam's highest rate (default: 0.0003).",
)
@click.option(
    "--step-tokens",
    type=positive,
    metavar="N",
    help="Tokens of a step (default: 2048, fewer for a short text). Fewer take less memory.",
)
@data_option("--dataset", "Text to train and judge on (default: that of the last collect).")
@data_options
@to_disk
def distil(call: Call) -> Report:
    """Stage routers that are trained to predict what the checkpoint predicts, after any edit.

    Minimises the KL divergence from the checkpoint's next tokens on calibration text; what collect
    held out decides which step is staged. Esc stops and stages the best so far. With --to nothing
    is written then. The report says whether more text would help.
    """
    values = {name: v for name, v in without(call.params).items() if name not in DATA_NAMES}
    values["seed"] = call.bench.settings.seed
    return with_text(call, lambda data: DistilOptions(**values, data=data), call.session.distil)


COMMANDS = (distil,)
