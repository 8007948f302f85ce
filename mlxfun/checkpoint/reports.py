"""The report on a saved model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.report import Report
from mlxfun.text import readable_bytes


@dataclass(frozen=True, slots=True)
class SaveReport(Report):
    """A saved model. gate: {check: outcome}, each outcome a word or a sentence. notices: what could
    not be saved, or not from where it was."""

    kind: ClassVar[str] = "save"
    path: str
    bytes: int
    files: tuple[str, ...]
    experts: int
    quantization: str | None
    gate: dict[str, str]
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        checks = ", ".join(f"{k} {v}" for k, v in self.gate.items())
        return f"saved {self.path} ({readable_bytes(self.bytes)}); {checks}"
