"""Hostfiles: as mlx.distributed_config writes them, or an error that names the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxfun.distributed.hosts import Host, local_hosts, read_hostfile
from mlxfun.errors import UsageError


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_hosts_are_read_in_order(tmp_path: Path) -> None:
    hosts = [
        {"ssh": "localhost", "ips": ["10.0.0.1", "10.0.1.1"]},
        {"ssh": "studio.local", "ips": ["10.0.0.2"], "python": "/opt/python"},
    ]
    for content in (hosts, {"backend": "ring", "hosts": hosts}):
        first, second = read_hostfile(written(tmp_path, content))
        assert (first.ssh, first.address) == ("", "10.0.0.1:32323")
        assert second == Host("studio.local", "10.0.0.2:32324", "/opt/python")


def test_a_machine_is_reached_by_ssh_and_words_stay_words(tmp_path: Path) -> None:
    command = Host("studio.local", "10.0.0.2:1", "/opt/my python").command(
        ["a model", "--rank", "1"]
    )
    assert command[:2] == ["ssh", "-T"]
    assert command[-2:] == [
        "studio.local",
        "'/opt/my python' -m mlxfun.distributed.worker 'a model' --rank 1",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ([], "must hold a list"),
        ({"hosts": 3}, "must hold a list"),
        ([{"ips": ["10.0.0.1"]}], 'entry 1 has no "ssh"'),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b"}], r'entry 2 \(b\) has no "ips"'),
        ([{"ssh": "b", "ips": ["studio"]}], "'studio' is no address"),
        ([{"ssh": "-oProxyCommand=x", "ips": ["10.0.0.1"]}], "is no name of a host"),
        ([{"ssh": "b", "ips": ["10.0.0.1"], "python": 3}], '"python" must be'),
    ],
)
def test_what_is_no_host_is_named(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_hostfile(written(tmp_path, content))


def test_local_workers_listen_on_the_loopback_address_only() -> None:
    hosts = local_hosts(3)
    assert len({host.address for host in hosts}) == 3
    assert all(host.address.startswith("127.0.0.1:") for host in hosts)
    with pytest.raises(UsageError, match="from 1 to 64"):
        local_hosts(0)
