"""Base class of the reports that commands return: frozen data, for people and for programs.

Every report has `kind` (its name), `summary()` (one sentence) and `data()` (JSON-able).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from mlxfun.tally import DataUse


def plain(value: Any) -> Any:
    """`value` with dataclasses, tuples, NumPy values and non-string keys made JSON-able."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return value


@dataclass(frozen=True, slots=True)
class Report:
    """Base class. inputs: what became of the data sets that the command read. caveat: what was
    different about the model, "" where it was as it is: experts were left out of its answers."""

    kind: ClassVar[str] = "report"
    inputs: tuple[DataUse, ...] = field(default=(), kw_only=True)
    caveat: str = field(default="", kw_only=True)

    def summary(self) -> str:
        """One sentence for a status line."""
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        found = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        # Most reports have neither.
        for name in ("inputs", "caveat"):
            if not found[name]:
                del found[name]
        return found


@dataclass(frozen=True, slots=True)
class TextReport(Report):
    """A command whose whole result is a sentence or a page of text."""

    kind: ClassVar[str] = "text"
    text: str

    def summary(self) -> str:
        return self.text
