"""Workers: `workers`, which starts, lists and stops them."""

from __future__ import annotations

import click

from commands.declare import Call, command
from commands.types import FilePath
from mlxfun.errors import UsageError
from mlxfun.report import Report


@command("workers", group="model", recorded=False)
@click.argument("count", required=False, type=click.IntRange(min=0))
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

    Each worker holds the model. The batches of collect, of scans, of --super-experts and of
    abliterate's directions are dealt out to them, with the same results as here, bit for bit, on
    machines of one kind. Edits follow by themselves. Without arguments it lists them.
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
