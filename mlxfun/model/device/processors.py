"""Work on the host that is spread over all processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_processors(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` on each item, one per processor, in order. For what lets go of the interpreter while it
    computes: NumPy's linear algebra and large arrays, SciPy's assignment, but not its LAPACK.

    Threads of its own, which a BLAS starts where nobody tells it not to, get in each other's way:
    they made inverses 17 times slower.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))
