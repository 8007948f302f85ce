"""Splits samples into a calibration part and a held-out part."""

from __future__ import annotations

import numpy as np

from mlxfun.errors import UsageError

HELD_OUT_SHARE = 0.125
HELD_OUT_LEAST = 4
"""Of the samples that are kept away from calibration, see `split_samples`."""


def split_samples(
    n: int, wanted: int | None, seed: int, share: float, least: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(calibration, held-out) indices into `n` samples, disjoint, both ascending.

    The held-out ones come from the samples that calibration does not want; only when it wants all
    of them is a `share` (at least `least`, at most half) taken away from it.
    """
    order = np.random.default_rng(seed).permutation(n)
    if wanted is not None and wanted < 1:
        raise UsageError(f"--max-samples {wanted} must be at least 1")
    if wanted is not None and wanted < n:
        held = min(n - wanted, max(least, round(wanted * share)))
        kept = wanted
    else:
        held = min(n // 2, max(least, round(n * share)))
        kept = n - held
    chosen, out = np.sort(order[:kept]), np.sort(order[kept : kept + held])
    return tuple(int(i) for i in chosen), tuple(int(i) for i in out)
