"""How far a pass over a model on disk has come, kept on disk so that one that was killed goes on.

Kept are the hidden states of all batches behind a layer, and what was seen of the layers so far;
the same pass, of the same weights and batches, takes them up. Writing them takes at most a tenth of
the time. A pass that ends removes what it kept; what is a week old is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from mlxfun.hooks.states import States
from mlxfun.text import installed_version

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch

LEAST_SECONDS = 60.0
"""Between two writings: a pass that takes less is sooner repeated."""

SHARE = 0.1
"""Of the time of a pass, what writing may take."""

KEPT_DAYS = 7

Seen = dict[int, list[mx.array]]
"""What was seen of one batch: small arrays by number of a layer."""


class Progress:
    """Of one pass, known by `identity`, in a directory of many."""

    def __init__(self, directory: Path, identity: str) -> None:
        self._place = directory / f"pass-{identity}"
        self._directory = directory
        self._written = time.monotonic()
        self._took = 0.0

    def due(self) -> bool:
        """Whether it is time to write."""
        since = time.monotonic() - self._written
        return since >= max(LEAST_SECONDS, self._took / SHARE)

    def write(self, layer: int, states: States, seen: Sequence[Seen]) -> None:
        """All batches are behind the layers ahead of `layer`. A failure to write is no failure of
        the pass."""
        began = time.monotonic()
        fresh = self._place.with_suffix(f".{layer}.partial")
        try:
            _fill(fresh, layer, states, seen)
            old = self._place.with_suffix(".old")
            if self._place.exists():
                self._place.rename(old)
            fresh.rename(self._place)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError):
            shutil.rmtree(fresh, ignore_errors=True)
        self._written = time.monotonic()
        self._took = self._written - began

    def read(self, states: States, seen: Sequence[Seen]) -> int:
        """Put back what was kept, into `states` and `seen`; the layer to go on with, 0 for none."""
        self._sweep()
        try:
            about = json.loads((self._place / "pass.json").read_text())
            files = [self._place / f"{number}.safetensors" for number in range(len(seen))]
            kept = [cast(dict[str, mx.array], mx.load(str(file))) for file in files]
            if about["batches"] != len(seen):
                return 0
            for number, arrays in enumerate(kept):
                mx.eval(list(arrays.values()))
                states.put(number, arrays.pop("hidden"))
                seen[number].update(_by_layer(arrays))
            return int(about["layer"])
        except (OSError, RuntimeError, ValueError, KeyError):
            for one in seen:
                one.clear()
            return 0

    def done(self) -> None:
        """The pass has ended."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what is old, and what was being written when its process died."""
        oldest = time.time() - KEPT_DAYS * 86400
        with contextlib.suppress(OSError):
            for place in self._directory.glob("pass-*"):
                if place.stat().st_mtime < oldest:
                    shutil.rmtree(place, ignore_errors=True)


def _fill(place: Path, layer: int, states: States, seen: Sequence[Seen]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for number, one in enumerate(seen):
        arrays = {"hidden": states.get(number)}
        arrays |= {f"{n}.{i}": a for n, many in one.items() for i, a in enumerate(many)}
        mx.save_safetensors(str(place / f"{number}.safetensors"), arrays)
    (place / "pass.json").write_text(json.dumps({"layer": layer, "batches": len(seen)}))


def _by_layer(arrays: Mapping[str, mx.array]) -> Seen:
    found: Seen = {}
    for name in sorted(arrays, key=lambda name: [int(part) for part in name.split(".")]):
        found.setdefault(int(name.partition(".")[0]), []).append(arrays[name])
    return found


def identity_of(weights: str, label: str, todo: Sequence[Batch]) -> str:
    """The identity of a pass: its weights, what it is for, and its batches.

    What watches see besides depends on nothing else that differs between two runs of a command.
    """
    digest = blake2b(digest_size=12)
    versions = [installed_version(package) for package in ("mlxfun", "mlx", "mlx-lm")]
    for text in (weights, label, str(mx.default_device()), *versions):
        digest.update(text.encode() + b"\0")
    for batch in todo:
        for array in (np.array(batch.tokens.shape), batch.tokens, batch.mask):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
