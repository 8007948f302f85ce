"""A process that has imported the whole program, and runs it again and again in forks of itself.

It reads one JSON object a line (see `tests.hostile.warm.Warm.run`) and answers each with one. A run
costs what the program does after its imports, has limits of its own, and can be killed at any call
without harm to the next. The parent never computes anything with MLX, whose threads do not survive
a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

PAGE = resource.getpagesize()


def warm_up() -> None:
    for name in (
        "mlxfun.session.session", "commands.cli", "commands.one_shot", "commands.runners.headless",
        "commands.runners.event_printer", "commands.runners.line_shell", "commands.output.console",
        "commands.output.render.dispatch", "commands.output.as_json", "tests.hostile.kill_points",
        "tests.hostile.kill_writers", "platformdirs",
    ):  # fmt: skip
        importlib.import_module(name)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert AutoTokenizer is not PreTrainedTokenizerFast  # both are imported on first use
    gc.collect()
    gc.freeze()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def named(path: str) -> Callable[..., Any]:
    """`module:function`."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def child(task: dict[str, Any], tell: int) -> None:
    """Run the task in this process, which ends with it. tell: gets the bytes at its beginning."""
    code = 70
    os.write(tell, str(resident_bytes()).encode())
    os.close(tell)
    try:
        for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(task[name], flags, 0o600), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(task["directory"])
        os.environ.update(task["environment"])
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, task["seconds"])
        if task["before"]:
            named(task["before"][0])(*task["before"][1:])
        if task["call"]:
            named(task["call"][0])(*task["call"][1:])
            code = 0
        else:
            sys.argv = ["mlxfun-shell", *task["arguments"]]
            named("commands.cli:main")()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 71
    except BaseException:  # noqa: BLE001  a traceback is what the tests look for
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 72
        os._exit(code)


def serve(requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        task = json.loads(line)
        heard, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(task, tell)
        os.close(tell)
        before = int(os.read(heard, 32))
        os.close(heard)
        _, status, used = os.wait4(pid, 0)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "grown": used.ru_maxrss * 1024 - before,
            "cpu": used.ru_utime + used.ru_stime,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What the program prints must not get between the answers.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    serve(sys.stdin, own)
