"""Command lines remembered between sessions."""

from __future__ import annotations

from pathlib import Path

LIMIT = 1000


class LineHistory:
    """Command lines in a text file, newest last. path None: nothing is kept.

    A file that cannot be read or written is ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last: str | None = None

    @staticmethod
    def default_path() -> Path:
        """The file on this system."""
        from platformdirs import user_state_path

        return user_state_path("mlxfun") / "lines"

    def beside(self, name: str) -> Path | None:
        """Another file of the same directory, None where nothing is kept."""
        return self._path.with_name(name) if self._path is not None else None

    def load(self) -> list[str]:
        """The newest lines, oldest first."""
        if self._path is None:
            return []
        try:
            lines = self._path.read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        kept = [line for line in lines if line.strip()][-LIMIT:]
        self._last = kept[-1] if kept else None
        return kept

    def add(self, line: str) -> None:
        """Append `line`, unless it repeats the last one."""
        if self._path is None or line == self._last:
            return
        self._last = line
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(" ".join(line.splitlines()) + "\n")
        except OSError:
            self._path = None
