"""Options of loading and saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlxfun.checkpoint.bits_plan import BitsPlan
from mlxfun.errors import UsageError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
"""How MLX packs weights."""

MODES: dict[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""(bits, group size) of the modes that have one of each."""

Resident = Literal["auto", "all", "none"] | int
"""What is held of a model: all of it, what fits, or at most so many bytes, with the experts that do
not fit read from disk when they are wanted; or nothing, and every pass runs layer by layer."""

Miss = Literal["read", "skip"]
"""What becomes of a choice of the router that is not in memory: it is read first, or left out, and
the weights of the others grow to the same sum. Skipping changes what the model says."""


@dataclass(frozen=True, slots=True)
class PackedCache:
    """KV caches packed to `bits` in groups of `group_size` values, as mlx-lm's --kv-bits does. start:
    how many tokens a cache has when it is packed, 0 for from the first on.

    Raises UsageError for what MLX has no kernel for.
    """

    bits: int
    group_size: int = 64
    start: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"--kv-bits {self.bits}: give 4 or 8")
        if self.group_size not in (32, 64, 128):
            raise UsageError(f"--kv-group-size {self.group_size}: give 32, 64 or 128")
        if self.start < 0:
            raise UsageError(f"--kv-start {self.start} must be a number of tokens, from 0 on")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """revision: of a Hub model. chat_template: a file whose template is used instead of the
    model's. identities: a file that remembers the fingerprints of checkpoints, so that a large one
    is not sampled again at each load; None to do without.

    resident: how much of the model is held in memory, see `Resident`. capacity: experts of each
    layer that are held, in place of a size. profile: a file that says which, see
    mlxfun.memory.profile. miss: see `Miss`. read_ahead: experts of the next layer that are read
    before its router has chosen, 0 for none. profiles: a folder that remembers which experts a model
    used last, where no profile is given; None to do without. scratch: with resident "none", a
    directory for hidden states and edited tensors; the system's by default. kv: how the KV caches of
    answers are packed, None for not at all.
    """

    revision: str | None = None
    chat_template: Path | None = None
    identities: Path | None = None
    resident: Resident = "all"
    capacity: int | None = None
    profile: Path | None = None
    miss: Miss = "read"
    read_ahead: int = 0
    profiles: Path | None = None
    scratch: Path | None = None
    kv: PackedCache | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a `resident` that is none: it would hold the whole model."""
        known = isinstance(self.resident, int) or self.resident in ("auto", "all", "none")
        if not known or self.resident is True:
            raise UsageError(
                f"resident {self.resident!r}: give 'auto', 'all', 'none', or a number of bytes"
            )


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Where and how to write. quantize: bits, or None to keep what was loaded. mode: of MLX; those
    other than affine have one width and one group size each (see `MODES`), and group_size is then
    not read. bits: a plan of bits per module in place of `quantize`; allow_stale: also one that was
    measured on other weights."""

    path: Path
    force: bool = False
    quantize: int | None = None
    mode: Mode = "affine"
    group_size: int = 64
    bits: BitsPlan | None = None
    allow_stale: bool = False
    max_shard_bytes: int = 5 << 30
