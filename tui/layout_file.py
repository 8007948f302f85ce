"""The layout of the panels, remembered between sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

LARGEST = 4096


class LayoutFile:
    """A small JSON file. path None: nothing is kept.

    A file that cannot be read or written is ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def load(self) -> Mapping[str, object]:
        """What was saved last, {} for nothing."""
        if self._path is None:
            return {}
        try:
            with self._path.open(encoding="utf-8") as file:
                found = json.loads(file.read(LARGEST))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save(self, data: Mapping[str, object]) -> None:
        """Replace what was saved."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(data), "utf-8")
        except OSError:
            self._path = None
