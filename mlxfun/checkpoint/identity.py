"""Identity of a checkpoint: a fast fingerprint, and a full digest on request.

The fingerprint covers the configuration, every safetensors header and a fixed number of blocks at
fixed relative positions of every file: its cost depends on the number of files, not their size.
Two copies of one checkpoint agree wherever they lie; a requantised, edited or differently
sharded one does not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mlxfun.checkpoint.headers import Header, read_headers
from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError

BLOCKS = 64
BLOCK_BYTES = 4096
_CHUNK = 16 << 20


def checkpoint_id(path: Path) -> str:
    """Fingerprint of the checkpoint directory `path`: 32 hex digits.

    Raises ModelError for a directory without a readable config.json or with broken weights.
    """
    digest = _start(path, "sampled")
    for header in read_headers(path):
        _add_header(digest, header)
        with header.path.open("rb") as file:
            for offset in _sample_offsets(header):
                file.seek(offset)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def full_digest(path: Path, ctx: Context = SILENT) -> str:
    """Digest over every byte of the weights: 32 hex digits; reads whole files, cancellable.

    Raises as `checkpoint_id` does, and Cancelled.
    """
    digest = _start(path, "full")
    headers = read_headers(path)
    total = sum(header.file_bytes for header in headers)
    done = 0
    for header in headers:
        _add_header(digest, header)
        with header.path.open("rb") as file:
            file.seek(header.data_start)
            while chunk := file.read(_CHUNK):
                ctx.check()
                digest.update(chunk)
                done += len(chunk)
                ctx.progress("verify", done, total, "B")
    return digest.hexdigest()


def _start(path: Path, purpose: str) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16, person=purpose.encode())
    file = path / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    # Reformatting the file changes no weights, so the fingerprint takes the parsed content.
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest


def _add_header(digest: hashlib.blake2b, header: Header) -> None:
    for part in (header.path.name.encode(), header.raw, str(header.file_bytes).encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _sample_offsets(header: Header) -> list[int]:
    """Offsets of the sampled blocks: evenly spread, the first and last bytes always included."""
    room = header.file_bytes - header.data_start - BLOCK_BYTES
    if room <= (BLOCKS - 1) * BLOCK_BYTES:
        # Small enough to read whole.
        return list(range(header.data_start, header.file_bytes, BLOCK_BYTES))
    return [header.data_start + room * i // (BLOCKS - 1) for i in range(BLOCKS)]
