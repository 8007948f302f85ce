"""What is worth knowing about the device before the first long computation, each said once."""

from __future__ import annotations

import sys
from ctypes.util import find_library
from functools import cache
from pathlib import Path

from mlxfun.context import Context
from mlxfun.events import Notice
from mlxfun.model.device.memory import on_cpu, on_cuda

FAST_BLAS = ("libopenblas", "libmkl", "libblis", "libflexiblas", "libarmpl", "libnvpl")
"""How the files of optimised BLAS libraries begin."""

COMPILING = "compiling kernels, once: the first forwards on this GPU can take a minute or two"

_said: set[str] = set()


def announce(ctx: Context) -> None:
    """Emit what was not said yet in this process. Call ahead of a pass over many tokens."""
    hints = [blas_hint()] if on_cpu() else [COMPILING] if on_cuda() else []
    for hint in hints:
        if hint and hint not in _said:
            _said.add(hint)
            ctx.emit(Notice("info", hint))


@cache
def blas_hint() -> str:
    """How to make MLX's CPU build faster, "" where nothing is known to.

    On Linux its wheel brings the reference BLAS, which an optimised one replaces when the dynamic
    linker is told to load that first.
    """
    if not sys.platform.startswith("linux") or not on_cpu() or not reference_blas(_loaded_files()):
        return ""
    return (
        "MLX multiplies matrices with the reference BLAS here; OpenBLAS is about ten times as fast: "
        + _remedy(find_library("openblas"))
    )


def reference_blas(files: list[str]) -> bool:
    """Whether no optimised BLAS is among the loaded `files` ahead of the one that MLX's wheel
    brings. Those inside the packages of NumPy and SciPy have names of their own and do not count.
    """
    names = [Path(file).name for file in files]
    own = any(name.startswith("libblas") for name in names)
    return own and not any(name.startswith(FAST_BLAS) for name in names)


def _remedy(library: str | None) -> str:
    install = "" if library else "install it (Debian: apt install libopenblas0-pthread), and "
    return f"{install}start with LD_PRELOAD={library or 'libopenblas.so.0'}"


def _loaded_files() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) > 5]
