"""Programs that start without their imports: runs of `tests/warm/server.py`, one server a worker.

For tests of what a program does, not of how it starts. Where forking a process that has imported
MLX is not safe (elsewhere than on Linux), the programs start as usual.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORKS = sys.platform == "linux"
SHELL = "commands.__main__:main"
STUB = "tests.commands.stub_program:run"
COLD = {SHELL: "commands", STUB: "tests.commands.stub_program"}


@functools.cache
def server() -> str:
    """The socket of a server, which is started by the first call and ends with this process."""
    made = tempfile.mkdtemp(prefix="warm-")
    path = os.path.join(made, "socket")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.server", path],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)
        shutil.rmtree(made)

    atexit.register(end)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.stdout.close()
    return path


def command(program: str) -> list[str]:
    """What starts the program; arguments follow. PYTHONPATH must lead to the repository."""
    if not FORKS:
        return [sys.executable, "-m", COLD[program]]
    client = str(Path(__file__).with_name("client.py"))
    return [sys.executable, "-I", "-S", client, server(), program]


def share_kernels(directory: Path) -> None:
    """For programs whose TMPDIR is `directory`: there MLX looks for compiled kernels, and compiles
    in half a second each what it does not find. They are the same as of every process.
    """
    shared = Path(os.environ.get("TMPDIR", "/tmp"), "mlx")
    shared.mkdir(parents=True, exist_ok=True)
    if not (directory / "mlx").exists():
        (directory / "mlx").symlink_to(shared)


def ask(task: dict[str, Any], streams: Sequence[int]) -> dict[str, Any]:
    """How the task ended. streams: descriptors of stdin, stdout and stderr."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server())
        said = json.dumps(task | {"streams": [0, 1, 2]}).encode() + b"\n"
        sent = socket.send_fds(connection, [said], list(streams))
        connection.sendall(said[sent:])
        with connection.makefile() as answers:
            assert answers.readline(), "the server has ended"
            answered: dict[str, Any] = json.loads(answers.readline())
    return answered
