"""Ways to damage safetensors and .npz files so that they must be refused; see `damage`."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.hostile.damage import NO_INTEGERS, NO_LISTS, NO_OBJECTS, NO_TEXTS, Damage

Header = dict[str, Any]

# --- safetensors -----------------------------------------------------------------------------


def header(change: Callable[[Header, random.Random], Any]) -> Damage:
    """A file whose header is changed in place, or replaced by what `change` returns."""

    def damaged(data: bytes, rng: random.Random) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + size])
        result = change(found, rng)
        text = result if isinstance(result, bytes) else json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return damaged


def tensor(found: Header, rng: random.Random) -> Any:
    return found[rng.choice([name for name in found if name != "__metadata__"])]


def shifted(found: Header, rng: random.Random) -> None:
    one = tensor(found, rng)
    by = rng.choice((-8, -2, 2, 8, 2**40, -(2**40)))
    one["data_offsets"] = [place + by for place in one["data_offsets"]]


def longer(found: Header, rng: random.Random) -> None:
    tensor(found, rng)["data_offsets"][1] += rng.choice((-2, 2, 2**62))


def doubled_key(found: Header, rng: random.Random) -> bytes:
    name = rng.choice([name for name in found if name != "__metadata__"])
    entry = json.dumps({name: found[name]})[1:-1]
    return (json.dumps(found)[:-1] + f", {entry}}}").encode()


def set_to(key: str, *values: Any) -> Damage:
    def change(found: Header, rng: random.Random) -> None:
        tensor(found, rng)[key] = rng.choice(values)

    return header(change)


def missing(found: Header, rng: random.Random) -> None:
    del found[rng.choice([name for name in found if name != "__metadata__"])]


def renamed(found: Header, rng: random.Random) -> None:
    name = rng.choice([name for name in found if name != "__metadata__"])
    found[rng.choice(("", "x", "\x1b[2J", "model.layers.99.weight"))] = found.pop(name)


def length(*lengths: int | None) -> Damage:
    """Another length of the header; None for one too small."""

    def damaged(data: bytes, rng: random.Random) -> bytes:
        chosen = rng.choice(lengths)
        (size,) = struct.unpack("<Q", data[:8])
        return struct.pack("<Q", size - 1 if chosen is None else chosen) + data[8:]

    return damaged


def cut_short(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def with_more(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b"x" * 4096, data[:64]))


SAFETENSORS: tuple[Damage, ...] = (
    cut_short, with_more, header(shifted), header(longer), header(doubled_key), header(missing),
    header(renamed), length(0, 1, 7, 2**31, 2**63, 2**64 - 1), length(None),
    # The sizes agree in these: only the architecture tells that they are wrong.
    set_to("dtype", "F16", "I16", "U16"), set_to("dtype", "F99", "", "bf16", *NO_TEXTS),
    set_to("shape", [1], [2, 2], [-1, 5], [2**40, 2**40], [1.5], *NO_LISTS),
    set_to("data_offsets", [0], [0, 1, 2], [5, 1], *NO_LISTS, *NO_INTEGERS),
    header(lambda found, rng: b"[" * 5000), header(lambda found, rng: b"{}"),
    header(lambda found, rng: b"null"), header(lambda found, rng: b"\xff" * 64),
    header(lambda found, rng: found.update({"x": rng.choice(NO_OBJECTS)})),
    header(lambda found, rng: found.update({"__metadata__": rng.choice((5, [1], "x", {"a": 1}))})),
)  # fmt: skip


# --- routing statistics ----------------------------------------------------------------------


def arrays(change: Callable[[dict[str, Any], random.Random], None]) -> Damage:
    def damaged(data: bytes, rng: random.Random) -> bytes:
        with np.load(io.BytesIO(data)) as archive:
            found = {name: archive[name] for name in archive.files}
        change(found, rng)
        stream = io.BytesIO()
        np.savez(stream, **found)  # type: ignore[arg-type]
        return stream.getvalue()

    return damaged


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A byte of an array's data changed; the archive's checksum tells."""
    found = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = rng.choice([m for m in archive.infolist() if m.compress_size > 200])
    name, extra = struct.unpack("<HH", data[member.header_offset + 26 : member.header_offset + 30])
    start = member.header_offset + 30 + name + extra
    place = rng.randrange(start + 20, start + member.compress_size - 1)
    found[place] ^= rng.randrange(1, 256)
    return bytes(found)


def put(name: str, *values: Any) -> Damage:
    def change(found: dict[str, Any], rng: random.Random) -> None:
        found[name] = np.asarray(rng.choice(values))

    return arrays(change)


def spoiled(*values: float) -> Damage:
    """One number of the sums that none can be."""

    def change(found: dict[str, Any], rng: random.Random) -> None:
        name = rng.choice([name for name in found if name == "freq" or name.endswith("_sum")])
        array = found[name].astype(np.float64)
        array.flat[rng.randrange(array.size)] = rng.choice(values)
        found[name] = array

    return arrays(change)


def dropped(found: dict[str, Any], rng: random.Random) -> None:
    del found[rng.choice(("freq", "reap_sum"))]


def reshaped(found: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([name for name in found if name == "freq" or name.endswith("_sum")])
    found[name] = rng.choice((found[name][:-1], found[name].T, found[name].ravel(), np.zeros(())))


def claiming(data: bytes, rng: random.Random) -> bytes:
    """An array whose header claims far more than the member holds."""
    shape = rng.choice((f"({2**31}, 16)", "(1000000, 1000000)", f"({2**63},)", "(-1, 16)"))
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"\0" * 64
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("freq.npy", "reap_sum.npy"):
            archive.writestr(name, raw)
    return stream.getvalue()


def bomb(data: bytes, rng: random.Random) -> bytes:
    """A kilobyte that unpacks to half a gigabyte and more."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("freq.npy", "reap_sum.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + b"\0" * (rng.choice((80, 160)) << 20))
    return stream.getvalue()


def pickled(data: bytes, rng: random.Random) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, freq=np.array([[{}, {}]], object), reap_sum=np.zeros((1, 2)))
    return stream.getvalue()


STATISTICS: tuple[Damage, ...] = (
    cut_short, flipped, claiming, pickled, arrays(dropped), arrays(reshaped),
    spoiled(-1.0, float("nan"), float("inf"), -float("inf"), -0.001),
    put("num_layers", 0, 7, -1, 1.5, "x", [6]), put("num_experts", 0, 15, -1, "16", 2**62),
    put("samples", -1, 1.5, "x", float("nan"), [1]), put("tokens", -1, "x", float("inf")),
    put("layer_indices", [0, 1], [5, 4, 3, 2, 1, 0], [-1, 1, 2, 3, 4, 5], "x", [0.5] * 6),
    put("combined", "x", 5, ["sum"]), put("state", 5, [1]), put("steered", 7, "x"),
    put("alive", [True], "x", 1.0), put("freq", "x", [["x"]], [[]], 5.0),
)  # fmt: skip
