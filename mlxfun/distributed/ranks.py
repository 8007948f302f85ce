"""The group of workers, joined by mx.distributed: each hands bytes to all others."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxfun.distributed.hosts import Backend
from mlxfun.errors import StateError

DIGEST = 16
MOST = 1 << 31
"""Bytes that a rank may hand over at a time: the exchange counts them in 32 bits."""


class Ranks:
    """This process's place in the group. rank: 0 <= rank < size."""

    def __init__(self, rank: int, addresses: Sequence[str], backend: Backend) -> None:
        """Join the group; waits until all have. addresses: "ip:port" of each rank."""
        self.rank, self.size = rank, len(addresses)
        self._group: mx.distributed.Group | None = None
        # The exchange is bytes on the host: only NCCL moves them from the device.
        self._stream = mx.gpu if backend == "nccl" else mx.cpu
        if self.size > 1:
            self._group = _joined(rank, addresses, backend)

    def gather(self, mine: bytes) -> list[bytes]:
        """What each rank handed over, in the order of ranks. All must call it.

        Raises StateError for what did not arrive whole: when a rank is gone, the ring hands out
        whatever was in its buffers and says nothing.
        """
        if self._group is None:
            return [mine]
        mine = blake2b(mine, digest_size=DIGEST).digest() + mine
        lengths = self._all(np.array([len(mine)], np.int32)).reshape(-1)
        width = int(lengths.max())
        if not 0 < width <= MOST or int(lengths.min()) < 0:
            raise StateError("what another worker sent did not arrive whole")
        padded = np.zeros(width, np.uint8)
        padded[: len(mine)] = np.frombuffer(mine, np.uint8)
        rows = self._all(padded).reshape(self.size, width)
        return [_whole(rows[rank, :length].tobytes()) for rank, length in enumerate(lengths)]

    def _all(self, array: np.ndarray) -> np.ndarray:
        found = mx.distributed.all_gather(mx.array(array), group=self._group, stream=self._stream)
        return np.array(found)


def _whole(part: bytes) -> bytes:
    """A part without its digest, which must be that of the rest."""
    digest, rest = part[:DIGEST], part[DIGEST:]
    if blake2b(rest, digest_size=DIGEST).digest() != digest:
        raise StateError("what another worker sent did not arrive whole")
    return rest


def _joined(rank: int, addresses: Sequence[str], backend: Backend) -> mx.distributed.Group:
    os.environ["MLX_RANK"] = str(rank)
    if backend == "nccl":
        host, _, port = addresses[0].rpartition(":")
        os.environ["MLX_WORLD_SIZE"] = str(len(addresses))
        os.environ["NCCL_HOST_IP"], os.environ["NCCL_PORT"] = host, port
        return mx.distributed.init(strict=True, backend="nccl")
    with tempfile.TemporaryDirectory(prefix="mlxfun-hosts-") as directory:
        hostfile = Path(directory) / "hosts.json"
        hostfile.write_text(json.dumps([[address] for address in addresses]))
        os.environ["MLX_HOSTFILE"] = str(hostfile)
        return mx.distributed.init(strict=True, backend="ring")
