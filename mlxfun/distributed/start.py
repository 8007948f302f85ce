"""Starting and stopping the workers of a session."""

from __future__ import annotations

from pathlib import Path

from mlxfun.context import SILENT, Context
from mlxfun.distributed.hosts import Backend, local_hosts, read_hostfile
from mlxfun.distributed.pool import Pool
from mlxfun.distributed.reports import WorkersReport
from mlxfun.errors import BudgetError, UsageError
from mlxfun.hooks.elsewhere import elsewhere_of
from mlxfun.model.device.memory import free_bytes
from mlxfun.model.parameters import flatten
from mlxfun.session.session import Session
from mlxfun.text import readable_bytes


def start(
    session: Session,
    count: int | None = None,
    hostfile: Path | None = None,
    backend: Backend = "ring",
    ctx: Context = SILENT,
) -> Pool:
    """Start `count` workers on this machine, or one on each host of `hostfile`, in place of those
    there are.

    Raises UsageError for a count or file that is none, BudgetError where the copies of the model
    would not fit in this machine's memory, WorkerError for a worker that does not start or holds
    another model.
    """
    if (count is None) == (hostfile is None):
        raise UsageError("say how many workers to start here, or give a hostfile")
    hosts = read_hostfile(hostfile) if hostfile is not None else local_hosts(count or 0)
    stop(session)
    here = sum(not host.ssh for host in hosts)
    size = sum(array.nbytes for _, array in flatten(session.model.parameters()))
    free = free_bytes()
    # On several GPUs each has memory of its own.
    if backend == "ring" and free is not None and here * size > free:
        raise BudgetError(
            f"{here} workers on this machine hold {readable_bytes(size)} each, and "
            f"{readable_bytes(free)} is free; start fewer"
        )
    return Pool(session, str(session.source), hosts, backend, ctx)


def stop(session: Session) -> None:
    """Stop the workers of a session, if there are any."""
    pool = elsewhere_of(session.model)
    if isinstance(pool, Pool):
        session.before_close.remove(pool.close)
        pool.close()


def workers_of(session: Session) -> WorkersReport:
    """The workers of a session."""
    pool = elsewhere_of(session.model)
    return pool.report() if isinstance(pool, Pool) else WorkersReport(())
