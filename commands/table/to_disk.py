"""The options --to and --force of edits, and what they do: a model directory in place of a plan."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TypeVar

import click

from commands import words
from commands.declare import Call, Params, dataset_options, stack
from commands.types import FilePath
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import UsageError
from mlxfun.events import Notice
from mlxfun.report import Report
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.distil.options import DistilOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions

Options = TypeVar(
    "Options", PruneOptions, MergeOptions, NarrowOptions, DistilOptions, AblateOptions
)

NAMES = ("to", "force")

to_disk = stack(
    click.option(
        "--to",
        type=FilePath(),
        metavar="PATH",
        help="Write the edited model there, layer after layer, and stage nothing: for models of "
        "which both sides do not fit in memory.",
    ),
    click.option("--force", is_flag=True, help="With --to, replace an existing directory."),
)


def without(params: Params) -> Params:
    """The values of a command's other options."""
    return {name: value for name, value in params.items() if name not in NAMES}


def with_text(
    call: Call,
    options: Callable[[DatasetOptions | None], Options],
    stage: Callable[[Options, Context], Report],
) -> Report:
    """`carry_out` on --dataset; without it on the text of the last collect (None), which is not always
    that of the data set named last."""
    if not call["dataset"]:
        return carry_out(call, options(None), stage)
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        return carry_out(call, options(data), stage)


def carry_out(call: Call, options: Options, stage: Callable[[Options, Context], Report]) -> Report:
    """Stage, or write straight to disk. stage: what stages it without --to."""
    if call["to"] is None:
        if call["force"]:
            raise UsageError("--force goes with --to PATH: it replaces an existing directory")
        return stage(options, call.ctx)
    to = SaveOptions(call.bench.writable(call["to"]), force=call["force"])
    settings = call.bench.settings
    if settings.max_kl is not None or settings.max_perplexity_ratio is not None:
        call.ctx.emit(
            Notice(
                "warning",
                "the limits that are set for apply are not checked with --to: load what is saved "
                "and evaluate it",
            )
        )
    session = call.session
    line, session.command = session.command, staging(session.command)
    try:
        return session.write_edit(options, to, call.ctx)
    finally:
        session.command = line


def staging(line: str) -> str:
    """The line that stages the same edit, for the recipe of what is written.

    >>> staging("merge --n-prune 4 --to 'a b' --force --auto")
    'merge --n-prune 4 --auto'
    """
    left, kept = iter(words.split(line)), []
    for word in left:
        if word == "--to":
            next(left, None)
        elif word != "--force" and not word.startswith("--to="):
            kept.append(word)
    return shlex.join(kept)
