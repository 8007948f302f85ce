"""The shell's side: starts workers, keeps their weights those that are live here, deals out batches.

Results equal those of one process bit for bit, for any number of workers: batches are made here as
they always are, each is run whole by one worker with the same code, and results are handed on in
the order of the batches, so that sums are added in the order in which they always are. That holds
between machines of one kind; MLX's kernels differ between devices.

A worker that ends, hangs or fails ends the job with its name and the end of its log. All workers
are stopped then, and later passes run in this process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import IO, TYPE_CHECKING

from mlxfun.context import SILENT, Context
from mlxfun.distributed.changes import changes
from mlxfun.distributed.frames import Frame, packed, unpacked
from mlxfun.distributed.hosts import Backend, Host
from mlxfun.distributed.reports import WorkerRow, WorkersReport
from mlxfun.distributed.worker import versions
from mlxfun.errors import StateError, WorkerError
from mlxfun.hooks.elsewhere import Task, register

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.session.session import Session

START_SECONDS = 600
"""How long a worker may take to load the model."""
SILENT_SECONDS = 20
"""A worker from which nothing was heard for so long hangs: it says twice a second that it lives."""
WAIT_SECONDS = 0.1
STOP_SECONDS = 2
LOG_LINES = 5


@dataclass(slots=True)
class _Member:
    """One worker process. heard: when the last frame of it came. busy: it has not left a job yet."""

    rank: int
    host: Host
    process: subprocess.Popen[bytes]
    log: Path
    hello: Frame | None = None
    heard: float = field(default_factory=monotonic)
    busy: bool = False
    listener: threading.Thread | None = None
    batches: int = 0

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"worker {self.rank} ({self.host.name})"

    def send(self, data: bytes) -> None:
        """Hand it a packed frame. Raises OSError when it is gone."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(data)
        stdin.flush()

    def last_words(self) -> str:
        """The end of its log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        said = " | ".join(line.strip() for line in lines[-LOG_LINES:] if line.strip())
        return f"; its log ends: {said[-600:]}" if said else ""


class Pool:
    """The workers of one session. Used and closed on the thread that owns the model."""

    def __init__(
        self,
        session: Session,
        source: str,
        hosts: Sequence[Host],
        backend: Backend = "ring",
        ctx: Context = SILENT,
    ) -> None:
        """Start a worker on each host and wait until all hold the model.

        source: the directory of the checkpoint, the same on each host. Raises WorkerError for one
        that does not start, or whose checkpoint or versions differ; none is left running then.
        """
        self._session, self._backend = session, backend
        self._directory = tempfile.TemporaryDirectory(prefix="mlxfun-workers-")
        self._inbox: queue.SimpleQueue[tuple[int, Frame | None]] = queue.SimpleQueue()
        self._members: list[_Member] = []
        self._live: str | None = None  # the state of the weights in the workers
        self._job = 0
        try:
            self._members = [self._started(r, h, hosts, source) for r, h in enumerate(hosts)]
            self._await_all("hello", START_SECONDS, ctx, "loading the model in workers")
            for member in self._members:
                self._require_same(member)
            self._await_all("joined", START_SECONDS, ctx, "joining workers")
        except BaseException:
            self.close()
            raise
        register(session.model, self)
        session.before_close.append(self.close)

    # -- starting and ending ------------------------------------------------------------------

    def _started(self, rank: int, host: Host, hosts: Sequence[Host], source: str) -> _Member:
        arguments = [
            source, "--rank", str(rank), "--backend", self._backend,
            "--hosts", json.dumps([one.address for one in hosts]),
        ]  # fmt: skip
        log = Path(self._directory.name) / f"worker-{rank}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                host.command(arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=self._environment(rank, len(hosts)),
                # Ctrl-C at the terminal cancels the job; it must not reach the workers.
                start_new_session=True,
            )
        member = _Member(rank, host, process, log)
        assert process.stdout is not None
        member.listener = threading.Thread(
            target=self._listen, args=(rank, process.stdout), daemon=True, name=f"worker-{rank}"
        )
        member.listener.start()
        return member

    def _environment(self, rank: int, size: int) -> dict[str, str]:
        found = dict(os.environ)
        # Processes on one machine share its processors.
        threads = str(max(1, (os.cpu_count() or 1) // size))
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            found.setdefault(name, threads)
        if self._backend == "nccl":
            found["CUDA_VISIBLE_DEVICES"] = str(rank)
        return found

    def _listen(self, rank: int, stdout: IO[bytes]) -> None:
        with stdout:
            while True:
                try:
                    frame = unpacked(stdout)
                except (StateError, OSError, ValueError):
                    frame = None
                self._inbox.put((rank, frame))
                if frame is None:
                    return

    def _require_same(self, member: _Member) -> None:
        """Raise WorkerError for another checkpoint or other versions than here."""
        assert member.hello is not None
        said = member.hello.data
        if said["checkpoint"] != self._session.checkpoint_id:
            raise WorkerError(
                f"{member.name} holds another checkpoint ({said['checkpoint']}) than this shell "
                f"({self._session.checkpoint_id}); copy the model to it anew"
            )
        mine = versions()
        other = [f"{n} {v} (here {mine[n]})" for n, v in said["versions"].items() if v != mine[n]]
        if other:
            raise WorkerError(f"{member.name} has {', '.join(other)}; install the same there")

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._members)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process of each worker on this machine, of ssh for the others."""
        return tuple(member.process.pid for member in self._members)

    def report(self) -> WorkersReport:
        """Who they are."""
        rows = []
        for member in self._members:
            said = member.hello.data if member.hello is not None else {}
            rows.append(
                WorkerRow(
                    member.rank, str(said.get("host")), str(said.get("device")), member.batches
                )
            )
        return WorkersReport(tuple(rows), self._backend, self._live or "")

    def close(self) -> None:
        """Stop all workers. Idempotent."""
        register(self._session.model, None)
        members, self._members = self._members, []
        for member in members:
            assert member.process.stdin is not None
            with suppress(OSError), member.process.stdin:
                member.send(packed(Frame("quit")))
        deadline = monotonic() + STOP_SECONDS
        for member in members:
            try:
                member.process.wait(max(0.0, deadline - monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            if member.listener is not None:
                member.listener.join(STOP_SECONDS)
        self._directory.cleanup()

    # -- listening ----------------------------------------------------------------------------

    def _next(self, ctx: Context, seconds: float | None = None) -> tuple[_Member, Frame]:
        """The next frame of a worker that is more than a sign of life. seconds: how long one may
        be silent, SILENT_SECONDS by default.

        Raises Cancelled, WorkerError for a worker that ended, failed or hangs.
        """
        while True:
            ctx.check()
            try:
                rank, frame = self._inbox.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                self._require_alive(SILENT_SECONDS if seconds is None else seconds)
                continue
            member = self._members[rank]
            member.heard = monotonic()
            if frame is None:
                code = self._code(member)
                self._fail(member, f"ended ({code})")
            elif frame.kind == "failed":
                failed = self._members[int(frame.data.get("rank", rank))]
                self._require_running([m for m in self._members if m is not failed])
                self._fail(failed, f"failed: {frame.data['why']}")
            elif frame.kind == "ended":
                member.busy = False
                return member, frame
            elif frame.kind != "alive":
                return member, frame

    def _require_running(self, members: Sequence[_Member]) -> None:
        """Raise WorkerError for one that has ended: what another one says is then its doing."""
        deadline = monotonic() + STOP_SECONDS / 2
        while members and monotonic() < deadline:
            for member in members:
                if member.process.poll() is not None:
                    self._fail(member, f"ended ({self._code(member)})")
            sleep(WAIT_SECONDS / 10)

    def _require_alive(self, seconds: float) -> None:
        for member in self._members:
            if monotonic() - member.heard > seconds:
                self._fail(member, f"has not answered for {seconds:.0f} s")

    @staticmethod
    def _code(member: _Member) -> str:
        try:
            code = member.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "its connection broke"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _fail(self, member: _Member, what: str) -> None:
        """Stop all workers and raise WorkerError."""
        message = f"{member.name} {what}{member.last_words()}"
        self.close()
        raise WorkerError(
            f"{message}. Nothing of it was counted; the workers are stopped, and passes run in "
            "this process from now on"
        )

    def _await_all(self, kind: str, seconds: float, ctx: Context, label: str) -> list[Frame]:
        """A frame of that kind from each worker, in the order of ranks."""
        found: dict[int, Frame] = {}
        while len(found) < len(self._members):
            member, frame = self._next(ctx, seconds)
            if frame.kind != kind:
                continue
            found[member.rank] = frame
            if kind == "hello":
                member.hello = frame
            if label:
                ctx.progress(label, len(found), len(self._members), "workers")
        return [found[rank] for rank in sorted(found)]

    def _tell(self, frame: Frame) -> None:
        data = packed(frame)
        for member in self._members:
            self._hand(member, data)

    def _hand(self, member: _Member, data: bytes) -> None:
        try:
            member.send(data)
        except OSError:
            self._fail(member, f"ended ({self._code(member)})")

    # -- jobs ---------------------------------------------------------------------------------

    def forwards(
        self, task: Task, todo: Sequence[Batch], ctx: Context
    ) -> Iterator[tuple[Batch, Array]] | None:
        """The result of each batch, in order; None where it has to run here: under steering."""
        _, steering = self._session.editor.key()
        if steering or not self._members or not todo:
            return None
        return self._run(task, todo, ctx)

    def _run(
        self, task: Task, todo: Sequence[Batch], ctx: Context
    ) -> Iterator[tuple[Batch, Array]]:
        self._settle(ctx)
        self._follow(ctx)
        self._job += 1
        turns = -(-len(todo) // self.size)
        for member in self._members:
            member.busy = True
            self._hand(member, packed(self._share(member.rank, task, todo, turns)))
        try:
            yield from self._results(todo, ctx)
            self._settle(ctx)
        finally:
            if any(member.busy for member in self._members):
                self._break_off()

    def _share(self, rank: int, task: Task, todo: Sequence[Batch], turns: int) -> Frame:
        """The batches of one worker: each `size`-th, from its rank on."""
        mine = todo[rank :: self.size]
        arrays: dict[str, Array] = {}
        for turn, batch in enumerate(mine):
            arrays |= {f"{turn}/tokens": batch.tokens, f"{turn}/mask": batch.mask}
            arrays |= {f"{turn}/given/{name}": a for name, a in task.given(batch).items()}
        data = {
            "job": self._job,
            "task": task.name,
            "settings": dict(task.settings),
            "turns": turns,
            "batches": [list(batch.rows) for batch in mine],
        }
        return Frame("job", data, arrays)

    def _results(self, todo: Sequence[Batch], ctx: Context) -> Iterator[tuple[Batch, Array]]:
        for number in count():
            if number == len(todo):
                return
            while True:
                member, frame = self._next(ctx)
                if frame.kind == "result":
                    break
                if not any(one.busy for one in self._members):
                    self._fail(member, f"ended the job ahead of result {number}")
            rank = int(frame.data["rank"])
            if int(frame.data["turn"]) * self.size + rank != number:
                self._fail(self._members[rank], f"sent a result out of turn ({number} was next)")
            self._members[rank].batches += 1
            yield todo[number], frame.arrays["result"]

    def _settle(self, ctx: Context) -> None:
        """Wait until the last job has ended everywhere."""
        while any(member.busy for member in self._members):
            self._next(ctx)

    def _break_off(self) -> None:
        """Let the workers leave the job; a batch that is running is let run to its end."""
        data = packed(Frame("cancel", {"job": self._job}))
        for member in self._members:
            try:
                member.send(data)
            except OSError:
                return  # the next job will name it

    def _follow(self, ctx: Context) -> None:
        """Make the workers' weights those that are live here. Raises WorkerError if they differ."""
        editor = self._session.editor
        state = editor.live_state
        if self._live == state:
            return
        self._live = None
        self._tell(changes(editor.resident, state))
        answers = self._await_all("became", START_SECONDS, ctx, "")
        for member, frame in zip(list(self._members), answers, strict=True):
            if frame.data["state"] != state:
                self._fail(member, f"has state {frame.data['state']} where {state} is live here")
        self._live = state
