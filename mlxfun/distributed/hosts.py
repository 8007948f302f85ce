"""Where workers run: on this machine, or on those of a hostfile as mlx.launch reads it."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from mlxfun.errors import UsageError

Backend = Literal["ring", "nccl"]

FIRST_PORT = 32323
LOCAL = ("localhost", "127.0.0.1")
MOST = 64


@dataclass(frozen=True, slots=True)
class Host:
    """One worker's machine. ssh: how it is reached, "" for this one. address: "ip:port", on which
    it listens for other workers. python: its interpreter.
    """

    ssh: str
    address: str
    python: str = sys.executable

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.ssh or "this machine"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What starts `python -m mlxfun.distributed.worker` there."""
        run = [self.python, "-m", "mlxfun.distributed.worker", *arguments]
        if not self.ssh:
            return run
        return ["ssh", "-T", "-o", "BatchMode=yes", self.ssh, shlex.join(run)]


def local_hosts(count: int) -> tuple[Host, ...]:
    """`count` workers on this machine, which listen on the loopback address only.

    Raises UsageError for a count that is none.
    """
    if not 1 <= count <= MOST:
        raise UsageError(f"--workers {count}: give a number from 1 to {MOST}")
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(Host("", f"127.0.0.1:{one.getsockname()[1]}") for one in sockets)
    finally:
        for one in sockets:
            one.close()


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile: a JSON list of {"ssh": name, "ips": [address, ...]}, as
    `mlx.distributed_config` writes it; "python" names another interpreter than this one's path.

    Raises UsageError naming the entry.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--hostfile {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UsageError(f"--hostfile {path} is not JSON ({error})") from error
    if isinstance(listed, dict):  # as newer versions write it, with the backend beside the hosts
        listed = listed.get("hosts")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST:
        raise UsageError(
            f'--hostfile {path} must hold a list of 1 to {MOST} hosts: [{{"ssh": "name", "ips": '
            '["192.168.0.1"]}, ...]'
        )
    return tuple(_host(path, number, entry) for number, entry in enumerate(listed))


def _host(path: Path, number: int, entry: Any) -> Host:
    where = f"--hostfile {path}: entry {number + 1}"
    if not isinstance(entry, dict) or not isinstance(entry.get("ssh"), str):
        raise UsageError(f'{where} has no "ssh", the name by which the machine is reached')
    ssh, ips = entry["ssh"], entry.get("ips")
    if ssh.startswith("-") or not ssh.isprintable() or " " in ssh:
        raise UsageError(f"{where}: {ssh!r} is no name of a host")
    local = ssh in LOCAL
    if not ips and local:
        ips = ["127.0.0.1"]
    if not isinstance(ips, list) or not ips or not isinstance(ips[0], str):
        raise UsageError(f'{where} ({ssh}) has no "ips", the address it listens on')
    try:
        ip_address(ips[0])
    except ValueError as error:
        raise UsageError(f"{where} ({ssh}): {ips[0]!r} is no address; give an IP") from error
    python = entry.get("python", sys.executable)
    if not isinstance(python, str) or not python:
        raise UsageError(f'{where} ({ssh}): "python" must be the path of an interpreter')
    return Host("" if local else ssh, f"{ips[0]}:{FIRST_PORT + number}", python)
