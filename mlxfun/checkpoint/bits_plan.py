"""A plan of bits per module, and its file: plain JSON that `save --quantize` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxfun.errors import UsageError
from mlxfun.files import Kind, json_with, write_text
from mlxfun.text import escaped

FORMAT = "mlxfun bits 1"
KIND = Kind("plan of bits", json_with("expected_kl"))

Layout = dict[str, int | str]
"""How a module is packed, as config.json has it: {"group_size": 64, "bits": 4, "mode": "affine"}."""


@dataclass(frozen=True, slots=True)
class BitsPlan:
    """state: of the weights that it was measured on. group_size: values that share a scale. bits:
    {module: bits} of what is packed, by the names of the saved model; what is not named stays as it
    is. groups: {module: group size} where the architecture asks for another. bytes: of all weights as saved then. expected_kl: what packing adds, in nats a token."""

    state: str
    group_size: int
    bits: Mapping[str, int]
    bytes: int
    expected_kl: float
    groups: Mapping[str, int] = field(default_factory=dict)

    @property
    def usual(self) -> int:
        """The bits of most modules."""
        counts = list(self.bits.values())
        return max(set(counts), key=counts.count)

    def write(self, path: Path) -> None:
        """Raises SaveError for a place that holds something else."""
        document = {"format": FORMAT, **asdict(self)}
        write_text(path, escaped(json.dumps(document, indent=2, allow_nan=False)) + "\n", KIND)


def read_bits(path: Path) -> BitsPlan:
    """A plan that `BitsPlan.write` wrote. Raises UsageError for anything else."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--quantize {path}: no bits, no mode and no plan of bits that can be read ({error}); "
            "write one with bits --to-bytes SIZE"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{path} holds no plan of bits; write one with bits --to-bytes SIZE")
    bits, groups = _numbers(found.get("bits")), _numbers(found.get("groups"))
    numbers = all(type(found.get(name)) is int for name in ("group_size", "bytes"))
    if not bits or groups is None or not numbers or not isinstance(found.get("state"), str):
        raise UsageError(
            f"{path} is a damaged plan of bits; write it again with bits --to-bytes SIZE"
        )
    kl = found.get("expected_kl")
    expected = float(kl) if isinstance(kl, int | float) else 0.0
    return BitsPlan(found["state"], found["group_size"], bits, found["bytes"], expected, groups)


def _numbers(found: Any) -> dict[str, int] | None:
    """`found` if it is a table of numbers."""
    right = isinstance(found, dict) and all(type(value) is int for value in found.values())
    return found if right else None
