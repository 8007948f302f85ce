"""A process that has imported the whole program, and runs it again and again in forks of itself.

It listens at the Unix socket named on its command line, and ends when its stdin does. Who connects
sends one task as JSON (see `Task`) and, as file descriptors, the streams of the run that are not
closed; it gets the number of the process and, once that has ended, how it ended, a JSON line each.
Who hangs up before has the process killed.

A run costs what the program does after its imports. The process that forks never computes anything
with MLX, whose threads do not survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

PAGE = resource.getpagesize()
LARGEST = 1 << 20
"""Bytes of a task at most; the environment is the most of it."""


@dataclass(frozen=True)
class Task:
    """program: `module:function`, called without arguments, with these in `sys.argv`.

    streams: which of the numbers 0, 1 and 2 are open; their descriptors come beside the task.
    before: a function, `module:function`, that is called first, and its arguments. seconds: after
    so many the process is ended by SIGALRM; 0: never. quick: the interpreter is not taken down at
    the end, which would be most of a short run.
    """

    program: str
    arguments: list[str]
    directory: str
    environment: dict[str, str]
    streams: list[int]
    call: list[Any] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)
    seconds: float = 0
    quick: bool = False


def warm_up() -> None:
    for name in (
        "mlxfun.session.session", "mlxfun.session.worker", "mlxfun.memory.plan.local",
        "commands.cli", "commands.one_shot", "commands.completion", "commands.engine",
        "commands.runners.headless", "commands.runners.event_printer",
        "commands.runners.line_shell", "commands.output.console",
        "commands.output.render.dispatch", "commands.output.as_json",
        "tests.commands.stub_session", "tests.hostile.kill_points", "tests.hostile.kill_writers",
        "platformdirs",
    ):  # fmt: skip
        importlib.import_module(name)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert AutoTokenizer is not PreTrainedTokenizerFast  # both are imported on first use
    gc.collect()
    gc.freeze()
    from commands.workbench import workbench

    # What is imported stays frozen: to go over it again, as closing does, touches every page of it.
    workbench.gc = SimpleNamespace(  # type: ignore[assignment]
        collect=gc.collect, freeze=lambda: None, unfreeze=lambda: None
    )


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def named(path: str) -> Callable[..., Any]:
    """`module:function`."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


@dataclass
class Run:
    """A fork of this process. before: its bytes at the beginning."""

    asked: socket.socket
    pid: int
    before: int

    def ended(self, status: int, used: resource.struct_rusage) -> None:
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "grown": used.ru_maxrss * 1024 - self.before,
            "cpu": used.ru_utime + used.ru_stime,
        }
        with suppress(OSError):  # hung up
            self.asked.sendall(json.dumps(answer).encode() + b"\n")
        self.asked.close()


class Server:
    def __init__(self, path: str) -> None:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(path)
        self.listening.listen()
        self.runs: dict[int, Run] = {}
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        signal.set_wakeup_fd(self.wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> tuple[Task, list[int]] | None:
        """None at the end of stdin; in a fork: its task, and the descriptors of its streams."""
        while True:
            asking = {run.asked: run for run in self.runs.values()}
            ready, _, _ = select.select([0, self.listening, self.woken, *asking], [], [])
            if 0 in ready:
                for run in self.runs.values():
                    os.kill(run.pid, signal.SIGKILL)
                return None
            if self.woken in ready:
                os.read(self.woken, 4096)
            for one in asking.keys() & set(ready):
                # Nobody says anything after the task: this is the end of who asked.
                os.kill(asking[one].pid, signal.SIGKILL)
            self._reap()
            if self.listening in ready and (found := self._fork()) is not None:
                return found

    def _reap(self) -> None:
        for run in list(self.runs.values()):
            pid, status, used = os.wait4(run.pid, os.WNOHANG)
            if pid:
                del self.runs[pid]
                run.ended(status, used)

    def _fork(self) -> tuple[Task, list[int]] | None:
        asked, _ = self.listening.accept()
        said, descriptors, _, _ = socket.recv_fds(asked, LARGEST, 3)
        while not said.endswith(b"\n"):
            said += asked.recv(LARGEST)
        heard, tell = os.pipe()
        pid = os.fork()
        if pid:
            for number in (tell, *descriptors):
                os.close(number)
            self.runs[pid] = Run(asked, pid, int(os.read(heard, 32)))
            os.close(heard)
            asked.sendall(f"{pid}\n".encode())
            return None
        os.write(tell, str(resident_bytes()).encode())
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (heard, tell, self.woken, self.wake):
            os.close(number)
        for one in (asked, self.listening, *(run.asked for run in self.runs.values())):
            one.close()
        return Task(**json.loads(said)), descriptors


def take_streams(task: Task, descriptors: list[int]) -> None:
    """Make the descriptors this process's streams, in the way that the interpreter does it."""
    given = dict(zip(task.streams, descriptors, strict=True))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        own = getattr(sys, f"__{name}__")
        stream = None
        if number in given:
            os.dup2(given[number], number)
            stream = open(  # noqa: SIM115
                number, "w" if number else "r", encoding=own.encoding, errors=own.errors,
                closefd=False, buffering=1 if number == 2 or os.isatty(number) else -1,
            )  # fmt: skip
        else:
            os.close(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for number in descriptors:
        os.close(number)


def leave(code: object) -> None:
    """End this process at once, with what the interpreter would make of `code`."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def become(task: Task) -> None:
    """Run the task in this process; SystemExit is how most programs end."""
    os.setsid()
    os.chdir(task.directory)
    os.environ.clear()
    os.environ.update(task.environment)
    tempfile.tempdir = None
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, task.seconds)
    sys.argv = ["mlxfun-shell", *task.arguments]
    if task.before:
        named(task.before[0])(*task.before[1:])
    if task.call:
        named(task.call[0])(*task.call[1:])
    else:
        named(task.program)()


if __name__ == "__main__":
    warm_up()
    server = Server(sys.argv[1])
    print("listening", flush=True)
    found = server.serve()
    if found is not None:
        take_streams(*found)
        try:
            become(found[0])
        except SystemExit as ended:
            if not found[0].quick:
                raise
            leave(ended.code)
