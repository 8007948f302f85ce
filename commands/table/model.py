"""The model as a whole: `load`, `info`, `layers`, `save`, `recover`, `smoke-test`."""

from __future__ import annotations

import click

from commands.conditions import always
from commands.declare import Call, command, positive
from commands.scripts.resume import offer
from commands.types import FilePath, Source
from mlxfun.checkpoint.options import MODES, RESIDENCIES, Mode, Residence, SaveOptions
from mlxfun.errors import ModelError, SaveError, StateError, UsageError
from mlxfun.report import Report, TextReport

BITS = ("2", "3", "4", "5", "6", "8")  # what MLX packs
MODEL = Source("model", {"demo": "the small Qwen3-MoE model that comes with mlxfun"})


@command("load", group="model", danger=True, when=always)
@click.argument("model", type=MODEL)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--chat-template",
    type=FilePath((".jinja", ".json")),
    help="Use this template, not the model's.",
)
@click.option(
    "--resident",
    type=click.Choice(RESIDENCIES),
    help="Hold all of it in memory (default), or none: layers are read from disk as they run.",
)
@click.option(
    "--scratch",
    type=FilePath(),
    metavar="DIR",
    help="With --resident none: where hidden states and edited tensors go.",
)
@click.option("--drop", is_flag=True, help="Free the loaded model first, for when both do not fit.")
def load(call: Call) -> Report:
    """Make a model resident: a directory, a Hub id, or demo.

    Statistics, staged plan, steering and history of the model before are dropped. If the
    new one cannot be loaded, the old one stays, unless --drop was given.

    With --resident none a model may be larger than memory: every pass over it (collect, scans,
    evaluate, edits, save) reads it layer by layer, with the same results. Answers read it once
    for each token.
    """
    residence = Residence(call["resident"] or "all", call["scratch"])
    report = call.bench.load(
        call["model"], call["revision"], call["drop"], call.ctx, call["chat_template"], residence
    )
    resumable = offer(call.bench)
    if resumable is not None:
        call.ctx.emit(resumable)
    return report


@command("info", group="model", key="I")
@click.option("--verify", is_flag=True, help="Read every byte of the checkpoint for its digest.")
def info(call: Call) -> Report:
    """Describe the resident model: architecture, experts, size, dtype, memory."""
    return call.session.info(call["verify"], call.ctx)


@command("layers", group="model")
def layers(call: Call) -> Report:
    """List the MoE layers: router, experts, top-k, groups, shared experts; else the decoder layers."""
    return call.session.layers()


@command("save", group="model", key="s", read_only=True)
@click.argument("path", type=FilePath())
@click.option("--force", is_flag=True, help="Replace an existing directory.")
@click.option(
    "--quantize",
    type=click.Choice((*BITS, *MODES)),
    metavar="BITS",
    help=f"Bits ({', '.join(BITS)}), or a mode of MLX: {', '.join(MODES)}.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="With --quantize BITS (default: 64); a mode has its own.",
)
def save(call: Call) -> Report:
    """Write the model as a directory that stock mlx_lm.load opens, and check that it does.

    What is saved is the applied state: a staged plan is not part of it, apply it first. The
    directory appears whole or not at all; an existing one is only replaced with --force, and only
    if it holds a model and nothing else. Of a clone, what belongs to git stays.
    """
    how = call["quantize"]
    mode: Mode = how if how in MODES else "affine"
    if mode != "affine" and call["group_size"]:
        raise UsageError(
            f"save: {how} packs groups of {MODES[mode][1]}, leave out --group-size "
            f"{call['group_size']}"
        )
    bits = MODES[mode][0] if mode in MODES else int(how) if how else None
    options = SaveOptions(
        path=call.bench.writable(call["path"]),
        force=call["force"],
        quantize=bits,
        mode=mode,
        group_size=int(call["group_size"] or 64),
    )
    return call.session.save(options, call.ctx)


@command("smoke-test", group="model")
@click.option("--prompt", metavar="TEXT", help="What to answer (default: a question of ours).")
@click.option(
    "--max-tokens", type=positive, metavar="N", help="Length of the answer (default: 24)."
)
def smoke_test(call: Call) -> Report:
    """Check that the live model still works: finite logits, sane text, routing in range."""
    report = call.session.smoke_test(call["prompt"], call["max_tokens"], call.ctx)
    if not report.passed:  # an error, so that a script stops there
        raise ModelError(f"{report.summary()}; {report.advice}")
    return report


@command("recover", group="model", when=always, recorded=False)
@click.argument("directory", required=False, type=FilePath(), default=".")
def recover(call: Call) -> Report:
    """Put back models that a killed save --force had moved aside in a directory (default: here)."""
    from mlxfun.checkpoint import atomic

    directory = call.bench.files.writable_directory(call["directory"])
    try:
        places = [str(atomic.recover(backup)) for backup in atomic.recoverable(directory)]
    except OSError as problem:
        raise SaveError(f"cannot recover in {directory}: {problem.strerror or problem}") from None
    if not places:
        raise StateError(f"nothing to recover in {directory.resolve()}")
    return TextReport(f"put back {', '.join(places)}")


COMMANDS = (load, info, layers, save, recover, smoke_test)
