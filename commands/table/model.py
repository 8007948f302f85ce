"""The model as a whole: `load`, `info`, `layers`, `save`, `recover`, `workers`..."""

from __future__ import annotations

import json
from pathlib import Path

import click

from commands.conditions import always, partly_resident, profiled
from commands.declare import Call, command, count_option, positive
from commands.scripts.resume import offer
from commands.types import FilePath, Packing, Size, Source, Whole
from commands.workbench.residency import Residency, residency_options
from mlxfun.checkpoint.bits_plan import read_bits
from mlxfun.checkpoint.options import MODES, Mode, SaveOptions
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
@residency_options
@click.option("--drop", is_flag=True, help="Free the loaded model first, for when both do not fit.")
def load(call: Call) -> Report:
    """Make a model resident: a directory, a Hub id, or demo.

    Statistics, staged plan, steering and history of the model before are dropped. If the
    new one cannot be loaded, the old one stays, unless --drop was given.

    A model may be larger than memory: with --resident auto or a size, experts that do not fit are
    read when they are wanted; with --resident none, every pass (collect, scans, evaluate, edits,
    save) reads it layer by layer. Results are the same. See the guide memory.
    """
    report = call.bench.load(
        call["model"],
        call["revision"],
        call["drop"],
        call.ctx,
        call["chat_template"],
        Residency.taken(call.params),
    )
    resumable = offer(call.bench)
    if resumable is not None:
        call.ctx.emit(resumable)
    return report


@command("models", group="model", when=always, recorded=False)
def models(call: Call) -> Report:
    """List what load takes without a download: recent models and the Hub's cache, and what fits.

    From the headers of their files alone. load without a model does the same.
    """
    return call.bench.models(call.ctx)


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
    type=Packing((*BITS, *MODES)),
    metavar="BITS",
    help=f"Bits ({', '.join(BITS)}), a mode of MLX ({', '.join(MODES)}), or a plan that bits wrote.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="With --quantize BITS (default: 64); a mode has its own.",
)
@click.option(
    "--allow-stale", is_flag=True, help="Take a plan of bits that was measured on other weights."
)
def save(call: Call) -> Report:
    """Write the model as a directory that stock mlx_lm.load opens, and check that it does.

    What is saved is the applied state: a staged plan is not part of it, apply it first. The
    directory appears whole or not at all; an existing one is only replaced with --force, and only
    if it holds a model and nothing else. Of a clone, what belongs to git stays.
    """
    how, path = call["quantize"], call.bench.writable(call["path"])
    if how is not None and how.endswith(".json"):
        if call["group_size"]:
            raise UsageError("save: a plan of bits has its own group size, leave out --group-size")
        bits_plan = read_bits(call.bench.readable(Path(how)))
        options = SaveOptions(path, call["force"], bits=bits_plan, allow_stale=call["allow_stale"])
        return call.session.save(options, call.ctx)
    mode: Mode = how if how in MODES else "affine"
    if mode != "affine" and call["group_size"]:
        raise UsageError(
            f"save: {how} packs groups of {MODES[mode][1]}, leave out --group-size "
            f"{call['group_size']}"
        )
    bits = MODES[mode][0] if mode in MODES else int(how) if how else None
    options = SaveOptions(
        path=path,
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


@command("residency", group="model")
@click.option("--reset", is_flag=True, help="Count from now on.")
def residency(call: Call) -> Report:
    """Show what of the model is in memory: slots, hits, bytes read a token, speed of the disk."""
    return call.session.forget_residency() if call["reset"] else call.session.residency()


@command("residency sweep", group="model", when=partly_resident, read_only=True)
@click.option(
    "--capacity", type=positive, multiple=True, metavar="N", help="Try N slots a layer. Repeatable."
)
@count_option("--max-tokens", "Length of each answer", 64)
def residency_sweep(call: Call) -> Report:
    """Find the number of slots with which the model answers fastest.

    More slots are slower where they push files out of the system's cache. Answers the same question
    with several numbers of slots, and puts back what there was.
    """
    return call.session.sweep_residency(call["capacity"], call["max_tokens"], call.ctx)


@command("profile save", group="model", when=profiled, read_only=True)
@click.argument("path", type=FilePath((".json",)))
def profile_save(call: Call) -> Report:
    """Write how much each expert is used, for load --profile: JSON, layer -> experts.

    Counted while a partly resident model answers; of one that is whole in memory, by collect.
    """
    return call.session.save_profile(call.bench.writable(call["path"]))


@command("profile load", group="model", when=partly_resident, recorded=False)
@click.argument("path", type=FilePath((".json", ".npz")))
def profile_load(call: Call) -> Report:
    """Keep in memory the experts used most, by a profile or a file of statistics.

    Profiles of mlx-moe are understood, and tables of layer -> experts.
    """
    return call.session.load_profile(call.bench.readable(call["path"]))


@command("plan", group="model", when=always, read_only=True)
@click.argument("model", type=MODEL)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--memory",
    type=Size(),
    metavar="SIZE",
    help="What the model may take (default: what this machine has).",
)
@click.option(
    "--bandwidth",
    type=Size(),
    metavar="SIZE",
    help="Bytes a second of the disk (default: measured, of a model on this machine).",
)
@click.option(
    "--profile",
    type=FilePath((".json", ".npz")),
    metavar="FILE",
    help="Foretell hits by a profile, or by statistics.",
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def plan(call: Call) -> Report:
    """Show how much memory a model needs and how it fits, before it is loaded or downloaded.

    From the headers of its files: bytes by part, whole or with how many experts a layer, tokens/s
    that the disk allows, and what prunes would need. plan alone means plan show.
    """
    from mlxfun.session.plan_memory import MemoryOptions, plan_memory

    profile = call["profile"]
    report = plan_memory(
        MemoryOptions(
            call.bench.source(call["model"]),
            call["revision"],
            call["memory"],
            call["bandwidth"],
            call.bench.readable(profile) if profile is not None else None,
        ),
        call.ctx,
    )
    return TextReport(json.dumps(report.data(), indent=2)) if call["as_json"] else report


@command("recover", group="model", when=always, recorded=False)
@click.argument("directory", required=False, type=FilePath(), default=".")
def recover(call: Call) -> Report:
    """Put back models that a killed save --force had moved aside in a directory (default: here)."""
    from mlxfun.checkpoint.replacing import atomic

    directory = call.bench.files.writable_directory(call["directory"])
    try:
        places = [str(atomic.recover(backup)) for backup in atomic.recoverable(directory)]
    except OSError as problem:
        raise SaveError(f"cannot recover in {directory}: {problem.strerror or problem}") from None
    if not places:
        raise StateError(f"nothing to recover in {directory.resolve()}")
    return TextReport(f"put back {', '.join(places)}")


@command("workers", group="model", recorded=False)
@click.argument("count", required=False, type=Whole(min=0))
@click.option(
    "--hostfile",
    type=FilePath((".json",)),
    help="Start one on each host of this file, as mlx.distributed_config writes it.",
)
@click.option(
    "--backend",
    type=click.Choice(["ring", "nccl"]),
    default="ring",
    help="How they are joined: ring (default), or nccl for one on each CUDA GPU.",
)
def workers(call: Call) -> Report:
    """Run passes on several processes: start COUNT here or some on other machines; 0 stops them.

    Each worker holds the model. The batches of collect, scans, evaluate and preview, of
    --super-experts and of abliterate's directions are dealt out to them, with the same results as
    here, bit for bit, on machines of one kind. Edits follow by themselves. Without arguments it
    lists them.
    """
    # It needs the session and MLX, which declaring a command must not load.
    from mlxfun.distributed.start import start, stop, workers_of

    count, hostfile = call["count"], call["hostfile"]
    if count is not None and hostfile is not None:
        raise UsageError(f"workers {count} and --hostfile {hostfile} exclude each other")
    if count == 0:
        stop(call.session)
    elif count is not None or hostfile is not None:
        start(call.session, count, hostfile, call["backend"], call.ctx)
    return workers_of(call.session)


COMMANDS = (
    load,
    models,
    plan,
    info,
    layers,
    residency,
    residency_sweep,
    profile_save,
    profile_load,
    save,
    recover,
    workers,
    smoke_test,
)
