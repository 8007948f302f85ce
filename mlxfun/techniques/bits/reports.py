"""Reports on bits per module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.report import Report
from mlxfun.text import counted, readable_bytes


@dataclass(frozen=True, slots=True)
class BitsRow:
    """Modules of one kind in all layers. least, mean, most: bits; UNPACKED for what stays as it is.
    bytes: as saved then."""

    projection: str
    modules: int
    least: int
    mean: float
    most: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same number of bits for all modules that have a choice."""

    bits: int
    bytes: int
    expected_kl: float


@dataclass(frozen=True, slots=True)
class BitsReport(Report):
    """A plan of bits. bytes: of all weights as saved. expected_kl: what packing adds, as the
    sensitivities have it. kl_before, kl_after: measured on held-out text against the checkpoint,
    without and with packing, in nats a token; ratio: the perplexity over the checkpoint's. gap: how
    far the choice may be from the best, relative to its expected KL. fixed: modules without a choice.
    path: the file, "" while there is none.
    """

    kind: ClassVar[str] = "bits"
    state: str
    bytes_before: int
    bytes: int
    target: int
    expected_kl: float
    kl_before: float
    kl_after: float
    perplexity: float
    ratio: float
    gap: float
    rows: tuple[BitsRow, ...]
    uniform: tuple[Uniform, ...]
    fixed: int
    tokens: int
    path: str = ""
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        size = f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes)}"
        modules = sum(row.modules for row in self.rows)
        kl = f"held-out KL {self.kl_before:.4f} -> {self.kl_after:.4f} nats"
        where = f"; {self.path} is for save --quantize" if self.path else ""
        return (
            f"bits of {counted(modules, 'module', 'modules')}: {size}, {kl}, perplexity "
            f"x{self.ratio:.3f}{where}"
        )
