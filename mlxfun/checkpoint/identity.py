"""Identity of a checkpoint: a fast fingerprint, and a full digest on request.

The fingerprint covers the configuration, every safetensors header, every small tensor whole
(routers, norms, biases, scales) and blocks of every large one: of a stack of experts [E, out, in]
blocks of each expert, of a matrix blocks spread over its rows. An edit of a router, of a norm or of
one whole expert changes it; an edit of few values of a large matrix need not, the full digest sees
that. Two copies of one checkpoint agree wherever they lie; a requantised, edited or differently
sharded one does not.

Fingerprints of earlier versions looked at 64 blocks of each file. They are told by their form, and
`earlier_id` computes them, so that files which hold one can still be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mlxfun.checkpoint.headers import Header, TensorInfo, read_headers, weight_files
from mlxfun.context import SILENT, Context
from mlxfun.errors import MlxfunError, ModelError
from mlxfun.files import write_json

PREFIX = "id2-"
"""Begins a fingerprint of this version; 32 hex digits follow. Earlier ones are 32 digits alone."""

BLOCK_BYTES = 4096
WHOLE_BYTES = 8 << 20
"""Up to this size a tensor may be hashed whole, smallest first, until WHOLE_TOTAL is used up."""

WHOLE_TOTAL = 512 << 20
EARLIER_BLOCKS = 64
_EARLIER = re.compile(r"[0-9a-f]{32}")
_CHUNK = 16 << 20
_THREADS = 8
# Below this an entry of the first axis is no expert's matrix but a row of a convolution.
_SLAB = 16 << 10
_CACHE_ENTRIES = 256
_CACHE_BYTES = 16 << 20
# A file written this recently may be written again without its time changing.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file from the one that replaces it; of a link, that of the file it leads to."""

    name: str
    bytes: int
    mtime_ns: int
    inode: int


def stamps(path: Path) -> tuple[Stamp, ...]:
    """The stamps of config.json and of the weights in the directory `path`.

    Raises ModelError for a file that is not there.
    """
    return tuple(_stamp(file) for file in (path / "config.json", *weight_files(path)))


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    return Stamp(file.name, found.st_size, found.st_mtime_ns, found.st_ino)


def difference(path: Path, before: Sequence[Stamp]) -> str:
    """What is different in `path` from when its stamps were `before`, as a sentence's beginning:
    "FILE was changed", "FILE is gone", "FILE is new"; "" for nothing.
    """
    for stamp in before:
        try:
            now = _stamp(path / stamp.name)
        except ModelError:
            return f"{path / stamp.name} is gone"
        if now != stamp:
            return f"{path / stamp.name} was changed"
    known = {stamp.name for stamp in before}
    added = [file for file in weight_files(path) if file.name not in known]
    return f"{added[0]} is new" if added else ""


def checkpoint_id(path: Path, cache: Path | None = None) -> str:
    """Fingerprint of the checkpoint directory `path`: PREFIX and 32 hex digits.

    cache: a JSON file that remembers fingerprints by the stamps of all files; it is made when it is
    missing, and one that cannot be read or written is done without.

    Raises ModelError for a directory without a readable config.json or with broken weights.
    """
    began = time.time_ns()
    found = stamps(path)
    known = _recall(cache, path, found) if cache is not None else None
    if known is not None:
        return known
    digest = _start(path, "rows")
    headers = read_headers(path)
    whole = _whole(headers)
    for header, parts in zip(headers, _sampled(headers, whole), strict=True):
        _add_header(digest, header)
        digest.update(parts)
    identity = PREFIX + digest.hexdigest()
    settled = all(stamp.mtime_ns < began - _SETTLED_NS for stamp in found)
    if cache is not None and settled and stamps(path) == found:
        _remember(cache, path, found, identity)
    return identity


def is_earlier(identity: str) -> bool:
    """Whether `identity` is a fingerprint as earlier versions made them."""
    return _EARLIER.fullmatch(identity) is not None


def earlier_id(path: Path) -> str:
    """The fingerprint that earlier versions gave to `path`, to compare it with one in a file.

    Raises as `checkpoint_id` does.
    """
    digest = _start(path, "sampled")
    for header in read_headers(path):
        _add_header(digest, header)
        with header.path.open("rb") as file:
            for offset in _earlier_offsets(header):
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
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    # Reformatting the file changes no weights, so the fingerprint takes the parsed content.
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest


def _add_header(digest: hashlib.blake2b, header: Header) -> None:
    for part in (header.path.name.encode(), header.raw, str(header.file_bytes).encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _earlier_offsets(header: Header) -> list[int]:
    """Evenly spread, the first and last bytes always included."""
    room = header.file_bytes - header.data_start - BLOCK_BYTES
    if room <= (EARLIER_BLOCKS - 1) * BLOCK_BYTES:
        # Small enough to read whole.
        return list(range(header.data_start, header.file_bytes, BLOCK_BYTES))
    return [header.data_start + room * i // (EARLIER_BLOCKS - 1) for i in range(EARLIER_BLOCKS)]


# --- what is read of each tensor -------------------------------------------------------------


def _whole(headers: Sequence[Header]) -> set[str]:
    """Names of the tensors that are hashed whole."""
    small = sorted(
        (info.nbytes, name)
        for header in headers
        for name, info in header.tensors.items()
        if info.nbytes <= WHOLE_BYTES
    )
    names, total = set(), 0
    for count, name in small:
        total += count
        if total > WHOLE_TOTAL:
            break
        names.add(name)
    return names


def blocks(info: TensorInfo, whole: bool) -> Iterator[tuple[int, int]]:
    """(offset in the file, bytes) of what is read of a tensor.

    The tensor is cut into equal parts, so many for each expert, and one block is read in each; its
    place in the part differs from part to part, so that a change of the same few columns in all
    rows is met somewhere.
    """
    if whole or info.nbytes <= BLOCK_BYTES:
        yield info.start, info.nbytes
        return
    rows = info.shape[0] if len(info.shape) > 2 else 1
    if info.nbytes < rows * _SLAB:
        rows = 1
    slab = info.nbytes // rows
    each = min(max(slab >> 18, 1), 4) if rows > 1 else min(max(slab >> 20, 4), 256)
    count = rows * each
    for i in range(count):
        begin, end = info.nbytes * i // count, info.nbytes * (i + 1) // count
        size = min(BLOCK_BYTES, end - begin)
        # Multiples of the golden ratio, modulo 1, are spread evenly in any order.
        shift = (end - begin - size) * (i * 2654435769 % (1 << 32)) >> 32
        yield info.start + begin + shift, size


def _sampled(headers: Sequence[Header], whole: set[str]) -> Iterator[bytes]:
    """For each header, the hashes of its tensors in the order of the file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for header in headers:
            tensors = sorted(header.tensors.items(), key=lambda item: (item[1].start, item[0]))
            descriptor = os.open(header.path, os.O_RDONLY)
            try:

                def one(item: tuple[str, TensorInfo], fd: int = descriptor) -> bytes:
                    digest = hashlib.blake2b(digest_size=16)
                    for offset, size in blocks(item[1], item[0] in whole):
                        digest.update(_read(fd, offset, size))
                    return digest.digest()

                yield b"".join(pool.map(one, tensors))
            except OSError as error:
                raise ModelError(f"cannot read {header.path}: {error.strerror}") from error
            finally:
                os.close(descriptor)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise OSError(0, "it became shorter while it was read")
    return data


# --- fingerprints remembered -----------------------------------------------------------------


def _recall(cache: Path, path: Path, found: Sequence[Stamp]) -> str | None:
    entry = _entries(cache).get(str(path.resolve()))
    if not isinstance(entry, dict) or entry.get("files") != _rows(found):
        return None
    identity = entry.get("id")
    good = isinstance(identity, str) and identity.startswith(PREFIX)
    return identity if good else None


def _remember(cache: Path, path: Path, found: Sequence[Stamp], identity: str) -> None:
    entries = _entries(cache)
    entries.pop(str(path.resolve()), None)
    entries[str(path.resolve())] = {"id": identity, "files": _rows(found)}
    newest = dict(list(entries.items())[-_CACHE_ENTRIES:])
    # It only saves time: where it cannot be written, the next load computes the same again.
    with contextlib.suppress(MlxfunError, OSError, ValueError):
        write_json(cache, {"version": PREFIX, "checkpoints": newest})


def _entries(cache: Path) -> dict[str, Any]:
    """What the cache holds by directory, the oldest first; empty where it is not readable."""
    try:
        if cache.stat().st_size > _CACHE_BYTES:
            return {}
        document = json.loads(cache.read_text("utf-8"))
        found = document["checkpoints"] if document["version"] == PREFIX else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(found: Sequence[Stamp]) -> list[list[Any]]:
    return [list(astuple(stamp)) for stamp in found]
