"""The memory planner: how much there is, how much is free, what work needs, and whether a failure
was for want of it.

Loading, every edit that makes tensors, and the check of a saved model ask here before they begin.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxfun.errors import BudgetError
from mlxfun.text import readable_bytes

_NO_MEMORY = ("out of memory", "unable to allocate", "insufficient memory", "[malloc", "cudamalloc",
              "attempting to allocate", "kiogpucommandbuffercallbackerroroutofmemory")  # fmt: skip


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device() == mx.Device(mx.cpu)


def on_cuda() -> bool:
    """Whether MLX computes on a CUDA device."""
    return not on_cpu() and not mx.metal.is_available()


def memory_limit() -> int | None:
    """Bytes a model may occupy: the device's recommended working set, or the machine's memory."""
    if not on_cpu():
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if isinstance(value := info.get(key), int) and value > 0:
                return value
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def free_bytes() -> int | None:
    """What is left beside the arrays that are alive; None where the limit is unknown. Memory that
    MLX keeps for reuse counts as free: it is given back when another size is asked for."""
    limit = memory_limit()
    return None if limit is None else max(limit - int(mx.get_active_memory()), 0)


@dataclass(frozen=True, slots=True)
class Need:
    """What an edit needs on top of the resident model, bytes.

    layers: the new tensors of each layer that is edited. work: the most that is held besides, while
    one of them is made. both: whether the new weights are run once all are made, which takes the
    disk space of what they replace where they go there.
    """

    layers: tuple[int, ...]
    work: int
    both: bool = False

    @property
    def staged(self) -> int:
        """With all new tensors in memory."""
        return sum(self.layers) + self.work

    @property
    def straight(self) -> int:
        """With those of one layer in memory."""
        return max(self.layers, default=0) + self.work

    @property
    def disk(self) -> int:
        """Of disk space, where it goes straight there, besides the model that is written."""
        return sum(self.layers) * (2 if self.both else 1)


LEAST_CACHE = 256 << 20
"""Of what is free, what MLX may keep for reuse at least: without any, every step allocates anew."""


def bound_cache(needed: int = 0) -> None:
    """Let MLX keep for reuse at most what is left beside the arrays that are alive and `needed`
    bytes more. Asked for after a load, and with every plan of work that takes memory."""
    free = free_bytes()
    if free is not None:
        mx.set_cache_limit(max(free - needed, min(free, LEAST_CACHE)))


def fits(needed: int) -> bool:
    """Whether `needed` bytes fit beside the arrays that are alive."""
    free = free_bytes()
    return free is None or needed <= free


def require(needed: int, what: str, advice: str, let_go: Callable[[], object] = int) -> None:
    """Raise BudgetError with the figures if `needed` bytes do not fit beside what is in use.

    what: the work, as the sentence begins; advice: what would need less; let_go: gives back what
    is kept for convenience only.
    """
    if not fits(needed):
        let_go()
        mx.clear_cache()
    limit, active = memory_limit(), int(mx.get_active_memory())
    if limit is not None and not fits(needed):
        beside = f" on top of {readable_bytes(active)} in use" if active else ""
        raise BudgetError(
            f"{what} needs about {readable_bytes(needed)}{beside}, over the {readable_bytes(limit)} "
            f"there are; {advice}"
        )
    bound_cache(needed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX failed because an allocation did."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(mark in said for mark in _NO_MEMORY)
