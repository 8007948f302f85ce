"""Options of loading and saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
"""How MLX packs weights."""

MODES: dict[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""(bits, group size) of the modes that have one of each."""

Residency = Literal["all", "none"]
"""How much of a model is in memory: all of it, or no decoder layer but the one that runs."""

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)


@dataclass(frozen=True, slots=True)
class Residence:
    """Where a model is. scratch: a directory for hidden states and edited tensors of one that is
    not all in memory; None for the system's."""

    resident: Residency = "all"
    scratch: Path | None = None


IN_MEMORY = Residence()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """revision: of a Hub model. chat_template: a file whose template is used instead of the
    model's. identities: a file that remembers the fingerprints of checkpoints, so that a large one
    is not sampled again at each load; None to do without. residence: how much of it is in memory."""

    revision: str | None = None
    chat_template: Path | None = None
    identities: Path | None = None
    residence: Residence = IN_MEMORY


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Where and how to write. quantize: bits, or None to keep what was loaded. mode: of MLX; those
    other than affine have one width and one group size each (see `MODES`), and group_size is then
    not read."""

    path: Path
    force: bool = False
    quantize: int | None = None
    mode: Mode = "affine"
    group_size: int = 64
    max_shard_bytes: int = 5 << 30
