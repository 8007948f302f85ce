"""Reads and validates an `.npz` file of routing statistics.

Experts are chosen by these numbers, so a file is understood in full or refused. Files of other
tools of the family have the sums and the shape alone; what they do not say has a default.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

from mlxfun.calibration.options import MERGE_RULES, Combined
from mlxfun.errors import DatasetError
from mlxfun.files import open_file

if TYPE_CHECKING:
    from mlxfun.arrays import Array

COMBINED: tuple[Combined, ...] = ("", *MERGE_RULES)
_REMEDY = "give a file written by `stats save`"
_LARGEST = 2**63 - 1
# The largest models have some 100 layers of 512 experts: half a MiB an array, two dozen arrays.
_MOST_ARRAYS = 64
_MOST_BYTES = 128 << 20


class Archive:
    """The arrays of a file, and what can be asked of them; each question raises DatasetError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _read(path)
        missing = [name for name in ("freq", "reap_sum") if name not in self._data]
        if missing:
            raise DatasetError(f"{path} lacks {', '.join(missing)}; it is not routing statistics")
        self.shape: tuple[int, ...] = self._data["freq"].shape
        if len(self.shape) != 2 or 0 in self.shape:
            raise self._wrong(f"freq is {_size(self.shape)}, which is no layers x experts")
        for name, size in zip(("num_layers", "num_experts"), self.shape, strict=True):
            if name in self._data and self.count(name, size) != size:
                stated = self.count(name, size)
                raise self._wrong(f"{name} is {stated} where freq is {_size(self.shape)}")

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def _wrong(self, what: str) -> DatasetError:
        return DatasetError(f"{self.path}: {what}; {_REMEDY}, or collect anew")

    def sums(self, name: str) -> Array:
        """Accumulated numbers from 0 on, float64 [L, E]. Raises KeyError where there are none."""
        found = self._data[name]
        if found.shape != self.shape:
            raise self._wrong(f"{name} is {_size(found.shape)} where freq is {_size(self.shape)}")
        if found.dtype.kind not in "fiu":
            raise self._wrong(f"{name} is not made of numbers")
        wide: Array = found.astype(np.float64)
        if not (np.isfinite(wide) & (wide >= 0)).all():
            raise self._wrong(f"{name} holds NaN, infinity or a number below 0")
        return wide

    def count(self, name: str, default: int = 0, least: int = 0) -> int:
        """A whole number."""
        found = self._data.get(name)
        if found is None:
            return default
        number = found.item() if found.ndim == 0 and found.dtype.kind in "fiu" else -1
        if not least <= number <= _LARGEST or number != int(number):
            raise self._wrong(f"{name} is not a whole number from {least} on")
        return int(number)

    def text(self, name: str) -> str:
        """A text, "" where the file has none."""
        found = self._data.get(name)
        if found is None:
            return ""
        if found.ndim != 0 or found.dtype.kind != "U":
            raise self._wrong(f"{name} is not a text")
        return str(found)

    def flag(self, name: str) -> bool:
        """True or false, false where the file does not say."""
        found = self._data.get(name)
        if found is None:
            return False
        if found.ndim != 0 or found.dtype.kind not in "biu" or found.item() not in (0, 1):
            raise self._wrong(f"{name} is neither true nor false")
        return bool(found)

    def mask(self, name: str) -> Array | None:
        """bool [L, E], None where the file has none."""
        found = self._data.get(name)
        if found is not None and (found.shape != self.shape or found.dtype.kind != "b"):
            raise self._wrong(f"{name} is not true or false for each expert of {_size(self.shape)}")
        return found

    @property
    def combined(self) -> Combined:
        """How the file was merged, "" if it was not."""
        how = self.text("combined")
        for known in COMBINED:
            if how == known:
                return known
        raise self._wrong(f"combined {how!r} is none of {', '.join(COMBINED[1:])}")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The decoder layer of each row, None where the file does not say."""
        found = self._data.get("layer_indices")
        if found is None:
            return None
        whole = found.dtype.kind in "iu" and found.shape == self.shape[:1]
        indices = tuple(int(i) for i in found) if whole else ()
        if not whole or indices[0] < 0 or not _ascending(indices):
            raise self._wrong(
                f"layer_indices is not a list of {self.shape[0]} ascending decoder layers"
            )
        return indices


def _ascending(indices: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(indices))


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single value"


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file, ZipFile(file) as archive:
            _require_bounded(archive, path)
            return {
                member.filename.removesuffix(".npy"): _array(archive, member)
                for member in archive.infolist()
            }
    except FileNotFoundError as error:
        raise DatasetError(f"{path} does not exist; {_REMEDY}") from error
    except IsADirectoryError as error:
        raise DatasetError(f"{path} is a directory; {_REMEDY}") from error
    except (
        ValueError, EOFError, KeyError, BadZipFile, zlib.error, MemoryError, NotImplementedError,
        RuntimeError,
    ) as error:  # fmt: skip
        # What NumPy says is meant for programmers (it suggests to unpickle the file). No memory:
        # for a file that claims to hold more than it does; the last two are of zip archives that
        # are encrypted, or packed in a way that Python does not know.
        raise _foreign(path) from error
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}; {_REMEDY}") from error


def _require_bounded(archive: ZipFile, path: Path) -> None:
    """By the archive's directory, before anything is unpacked: a few bytes may claim to be many."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if len(members) > _MOST_ARRAYS or total > _MOST_BYTES:
        raise DatasetError(
            f"{path} holds {len(members):,} arrays of {total >> 20:,} MiB when unpacked, and "
            f"routing statistics have at most {_MOST_ARRAYS} of {_MOST_BYTES >> 20} MiB; {_REMEDY}"
        )


def _array(archive: ZipFile, member: ZipInfo) -> Array:
    """One array. Raises ValueError where its header claims more than the member holds."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError("the header claims more than there is")
    with archive.open(member) as stream:
        found: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return found


def _foreign(path: Path) -> DatasetError:
    return DatasetError(f"{path} is not an .npz of routing statistics, or is damaged; {_REMEDY}")
