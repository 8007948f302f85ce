"""`bits`: how many bits each module is saved with, chosen by loss within a size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from commands.conditions import whole
from commands.declare import Call, command, data_option, data_options, dataset_options
from commands.types import NewFile, SavedSize
from mlxfun.checkpoint.bits_plan import KIND
from mlxfun.errors import UsageError
from mlxfun.files import require_writable
from mlxfun.report import Report
from mlxfun.techniques.bits.options import CHOICES, BitsOptions


@command("bits", group="edit", when=whole, read_only=True)
@click.option(
    "--to-bytes",
    type=SavedSize(),
    required=True,
    metavar="SIZE",
    help="What the weights of the saved model may take.",
)
@click.option(
    "--choices",
    metavar="BITS",
    default=",".join(map(str, CHOICES)),
    help="Bits that a module may have, 16 for as it is (default: 2,3,4,6,8,16).",
)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64",
              help="Values that share a scale (default: 64).")  # fmt: skip
@click.option(
    "--output",
    type=NewFile((".json",)),
    metavar="FILE",
    default="bits.json",
    help="Where the plan goes (default: bits.json).",
)
@data_option("--dataset", "Text to measure on (default: that of the last collect).")
@data_options
def bits(call: Call) -> Report:
    """Choose how many bits each module is saved with: least loss within a size.

    One pass with a gradient says how much the model's predictions mind an error in each weight; the
    bits that cost least within --to-bytes go to a file, which save --quantize FILE takes. Nothing in
    memory changes. The report has the KL of the packed model on what collect held out.
    """
    options = BitsOptions(
        to_bytes=call["to_bytes"],
        choices=_numbers(call["choices"]),
        group_size=int(call["group_size"]),
        seed=call.bench.settings.seed,
    )
    output = call.bench.writable(Path(call["output"]))
    require_writable(output, KIND)
    if not call["dataset"]:  # the text of the last collect, not the data set named last
        return _written(call, options, output)
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        return _written(call, replace(options, data=data), output)


def _written(call: Call, options: BitsOptions, output: Path) -> Report:
    plan, report = call.session.bits(options, call.ctx)
    plan.write(output)
    return replace(report, path=str(output))


def _numbers(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= 2 for word in words):
        raise UsageError(f"--choices {text}: give numbers of bits, e.g. 3,4,6")
    return tuple(dict.fromkeys(sorted(map(int, words))))


COMMANDS = (bits,)
