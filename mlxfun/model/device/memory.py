"""Memory of the device: how much there is, how much is free, and whether a failure was for want of it."""

from __future__ import annotations

import os

import mlx.core as mx

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX failed because an allocation did."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(mark in said for mark in _NO_MEMORY)
