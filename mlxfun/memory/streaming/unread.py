"""The parameters of a checkpoint that was loaded, opened again without reading any of them."""

from __future__ import annotations

from contextlib import suppress

import mlx.core as mx
from mlx_lm.utils import load_model

from mlxfun.checkpoint.load import LOAD_ERRORS, Loaded, short
from mlxfun.checkpoint.sources import without_wildcards
from mlxfun.errors import ModelError
from mlxfun.model.parameters import flatten

SPARE_FILES = 256
"""Open files for everything else."""


def unread(loaded: Loaded) -> dict[str, mx.array]:
    """Every parameter by path, as stock loading makes it; each is read when it is evaluated.

    Raises ModelError if the files are not those that were loaded.
    """
    require_unchanged(loaded)
    try:
        with without_wildcards(loaded.path) as plain:
            model, _ = load_model(plain, lazy=True)
    except LOAD_ERRORS as error:
        require_unchanged(loaded)
        raise ModelError(f"{loaded.path} cannot be opened again: {short(error)}") from error
    return dict(flatten(model.parameters()))


def require_unchanged(loaded: Loaded) -> None:
    """Raise ModelError if the files are not those that were loaded."""
    if changed := loaded.changed:
        raise ModelError(
            f"{changed} since the model was loaded from it, so tensors that are not in memory "
            "cannot be read back; put the file back as it was, or save the model as it is and "
            "load that"
        )


def allow_open_files(count: int) -> None:
    """Let this process have so many files open beside what it has, as far as the system lets it.

    Each opening of a checkpoint keeps all its files open, and two are alive at a time.
    """
    try:
        import resource  # only on systems that have such a limit
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
