"""A path that stock mlx-lm can search: it treats `*`, `?` and `[` in a directory's name as wildcards."""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxfun.errors import ModelError


def has_wildcards(path: Path) -> bool:
    """Whether stock mlx-lm finds no weights below `path` because of its name."""
    return glob.has_magic(str(path))


@contextlib.contextmanager
def without_wildcards(path: Path) -> Iterator[Path]:
    """`path`, or a link to it under a plain name that lasts as long as the block.

    Lazy arrays keep their files open, so they outlive the link. Raises ModelError where even
    temporary files have such names.
    """
    if not has_wildcards(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mlxfun-") as folder:
        link = Path(folder) / "model"
        if has_wildcards(link):
            raise ModelError(f"{path} and the directory for temporary files hold [, * or ?; rename")
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link
