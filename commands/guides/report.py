"""The report of `help` for a guide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxfun.report import TextReport


@dataclass(frozen=True, slots=True)
class GuideReport(TextReport):
    """A guide as text of the usual width. name: of the guide, to lay it out for another width."""

    name: str

    def data(self) -> dict[str, Any]:
        """The text, as of every page of help."""
        return {"text": self.text}
