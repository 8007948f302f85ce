"""A worker: a process that holds the model and runs the batches that the shell gives it.

    python -m mlxfun.distributed.worker --rank 0 --hosts '["127.0.0.1:5000"]' MODEL

It speaks frames (mlxfun.distributed.frames) on standard input and output; whatever else writes to
the output goes to the standard error stream instead. The batches of a job are dealt out to the
ranks in turns; after each turn the ranks exchange their results, and rank 0 passes them on. A rank
that fails or is told to stop says so in the exchange, so that all of them leave the job together.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import queue
import sys
import threading
from importlib.metadata import version
from typing import IO, Any

import mlx.core as mx
import numpy as np

from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import Context, as_running
from mlxfun.data.datasets import Batch
from mlxfun.distributed.changes import delta_of
from mlxfun.distributed.frames import Frame, packed, unpacked
from mlxfun.distributed.passes import PASSES
from mlxfun.distributed.ranks import Ranks
from mlxfun.errors import Cancelled, MlxfunError, StateError
from mlxfun.hooks.forwards import each_forward
from mlxfun.model.delta import Delta
from mlxfun.session.session import Session

ALIVE_SECONDS = 0.5
"""How often a worker says that it is alive."""


class Line:
    """The connection to the shell: frames out, and those that came in by a thread of their own."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes], rank: int) -> None:
        self.inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.cancelled = 0  # the last job that the shell has left
        self.state = ""
        self._stdin, self._stdout, self._rank = stdin, stdout, rank
        self._lock = threading.Lock()
        self._closed = threading.Event()
        for work in (self._read, self._say_alive):
            threading.Thread(target=work, daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Hand a frame to the shell; a shell that is gone ends the worker."""
        data = packed(frame)
        try:
            with self._lock:
                self._stdout.write(data)
                self._stdout.flush()
        except OSError:
            os._exit(1)

    def _read(self) -> None:
        while True:
            try:
                frame = unpacked(self._stdin)
            except (StateError, OSError):
                frame = None
            if frame is not None and frame.kind == "cancel":
                self.cancelled = int(frame.data["job"])
                continue
            self.inbox.put(frame)
            if frame is None:
                # The shell is gone. A rank that waits for another one would never see it.
                self._closed.wait(5)
                os._exit(0)

    def _say_alive(self) -> None:
        while not self._closed.wait(ALIVE_SECONDS):
            self.send(Frame("alive"))

    def close(self) -> None:
        """Say nothing any more."""
        self._closed.set()


class _Job(Context):
    """A job that the shell may leave in the middle of a batch, where that takes many forwards."""

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number

    def check(self) -> None:
        """Raise Cancelled once the shell has left the job."""
        if self._line.cancelled >= self._number:
            raise Cancelled


class Worker:
    """The model, the edits that are live in it, and the group."""

    def __init__(self, session: Session, ranks: Ranks, line: Line) -> None:
        self._session, self._ranks, self._line = session, ranks, line
        self._back: Delta | None = None  # from what is live to the checkpoint

    def run(self) -> None:
        """Answer frames until the shell goes."""
        while (frame := self._line.inbox.get()) is not None and frame.kind != "quit":
            try:
                if frame.kind == "become":
                    self._become(frame)
                elif frame.kind == "job":
                    self._job(frame)
                else:
                    raise StateError(f"a worker knows no {frame.kind!r}")
            except Exception as error:  # noqa: BLE001 - the shell must hear of it, whatever it is
                self._line.send(Frame("failed", {"why": _said(error)}))

    def _become(self, frame: Frame) -> None:
        """Make the weights those that are live in the shell."""
        resident = self._session.editor.resident
        if self._back is not None:
            resident.swap(self._back)
            self._back = None
        delta = delta_of(frame)
        if delta.layers:
            self._back = resident.swap(delta)
        self._line.send(Frame("became", {"state": self._session.editor.live_state}))

    def _job(self, frame: Frame) -> None:
        turns, task = int(frame.data["turns"]), str(frame.data["task"])
        for turn in range(turns):
            parts = self._ranks.gather(self._result(frame, task, turn))
            seen = [unpacked(io.BytesIO(part)) for part in parts]
            found = [one for one in seen if one is not None]
            if self._ranks.rank == 0:
                for rank, one in enumerate(found):
                    data = {**one.data, "rank": rank, "turn": turn}
                    self._line.send(Frame(one.kind, data, one.arrays))
            if any(one.kind in ("failed", "stopped") for one in found):
                break
        self._line.send(Frame("ended", {"turns": turns}))

    def _result(self, frame: Frame, task: str, turn: int) -> bytes:
        """What this rank has to say of one turn, packed."""
        # By its number: a cancel may arrive when the job it is for has ended already.
        if self._line.cancelled >= int(frame.data["job"]):
            return packed(Frame("stopped"))
        rows = frame.data["batches"]
        if turn >= len(rows):
            return packed(Frame("idle"))
        try:
            return packed(self._batch(frame, task, turn))
        except Cancelled:
            return packed(Frame("stopped"))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for this one's part
            return packed(Frame("failed", {"why": _said(error)}))

    def _batch(self, frame: Frame, task: str, turn: int) -> Frame:
        arrays = frame.arrays
        prefix = f"{turn}/given/"
        given = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        batch = Batch(
            np.array(arrays[f"{turn}/tokens"]),
            np.array(arrays[f"{turn}/mask"]),
            tuple(frame.data["batches"][turn]),
        )
        session = self._session
        run = PASSES[task]

        def watch(part: Batch) -> Any:
            return run(session, part, frame.data["settings"], given)

        # A batch with arrays of its own cannot be halved: what was given would not fit the halves.
        with as_running(_Job(self._line, int(frame.data["job"]))):
            made = list(each_forward(session.model, session.anatomy, [batch], watch))
        if len(made) > 1:
            raise StateError(
                f"a batch of {batch.tokens.size:,} tokens does not fit in this worker's memory; "
                "lower --batch-tokens"
            )
        return Frame("result", {}, {"result": made[0][1]})


def _said(error: Exception) -> str:
    if isinstance(error, MlxfunError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def described(session: Session, rank: int) -> dict[str, Any]:
    """Who this worker is, for the shell to compare."""
    return {
        "rank": rank,
        "host": platform.node(),
        "device": "GPU" if mx.default_device() == mx.Device(mx.gpu) else "CPU",
        "checkpoint": session.checkpoint_id,
        "state": session.editor.live_state,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what computes; results are equal only where these are."""
    return {name: version(name) for name in ("mlx", "mlx-lm", "mlxfun", "numpy")}


def main() -> None:
    """Start a worker; see the module's text."""
    parser = argparse.ArgumentParser(prog="mlxfun.distributed.worker")
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--hosts", required=True, help='JSON list of "ip:port"')
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring")
    args = parser.parse_args()
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not come between frames
    sys.stdin = io.StringIO()
    line = Line(stdin, stdout, args.rank)
    try:
        session = Session.open(args.model, LoadOptions())
        line.send(Frame("hello", described(session, args.rank)))
        ranks = Ranks(args.rank, json.loads(args.hosts), args.backend)
        line.send(Frame("joined"))
        Worker(session, ranks, line).run()
    except Exception as error:
        line.send(Frame("failed", {"why": _said(error)}))
        raise SystemExit(1) from error
    finally:
        line.close()


if __name__ == "__main__":
    main()
