"""Where commands may read and write, and which files belong to the resident model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlxfun.errors import UsageError


@dataclass(frozen=True, slots=True)
class Loaded:
    """The resident model as a session file names it.

    chat_template: the file given with --chat-template. residency: the options that said how much to
    hold, "" for none. state: the one right after loading. directory: where its files are, to which nothing is written.
    """

    source: str
    revision: str | None
    checkpoint: str
    state: str
    directory: Path
    chat_template: str | None = None
    residency: str = ""

    def owns(self, path: Path) -> bool:
        """Whether `path` lies inside the model's directory, or is a file that it links to."""
        target, own = (Path(os.path.realpath(p)) for p in (path, self.directory))
        if target.is_relative_to(own):
            return True
        # A snapshot of the Hub's cache consists of links.
        return target in {Path(os.path.realpath(f)) for f in own.glob("*")}


@dataclass(slots=True)
class Files:
    """Where a command may read and write.

    root: writes stay below it (None: anywhere). script: the directory of the replay file, which
    relative paths that do not exist here are looked up in. In a script an absolute path is laid
    below the root: /a/b is ROOT/a/b.
    """

    root: Path | None = None
    script: Path | None = None

    def writable(self, path: Path) -> Path:
        """The path to write for `path`. Raises UsageError if it lies outside the root."""
        if self.root is None:
            return path
        root = self.root.resolve()
        inner = path
        if self.script is not None and path.is_absolute() and not path.is_relative_to(root):
            inner = path.relative_to(path.anchor)
        target = (root / inner).resolve()
        if target == root or not target.is_relative_to(root):
            raise UsageError(
                f"{path} lies outside the output root {root}: use a path below it, or choose "
                "another with --output-root"
            )
        return target

    def writable_directory(self, path: Path) -> Path:
        """The directory to write below for `path`, which may be the root itself."""
        if self.root is not None and (self.root / path).resolve() == self.root.resolve():
            return self.root
        return self.writable(path)

    def readable(self, path: Path) -> Path:
        """The path to read for `path`: below the root, else as it is, else beside the script."""
        path = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
        if path.is_absolute():
            if self.root is not None and self.script is not None:
                laid = self.root / path.relative_to(path.anchor)
                return laid if exists(laid) else path
            return path
        if self.root is not None and exists(self.root / path):
            return self.root / path
        if self.script is not None and not exists(path) and exists(self.script / path):
            return self.script / path
        return path


def exists(path: Path) -> bool:
    """Whether `path` exists; False for a name that no file system takes."""
    # Not path.exists(), which raises OSError for such a name.
    return os.path.exists(path)
