"""Options of saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Where and how to write. quantize: bits, or None to keep what was loaded."""

    path: Path
    force: bool = False
    quantize: int | None = None
    group_size: int = 64
    max_shard_bytes: int = 5 << 30
