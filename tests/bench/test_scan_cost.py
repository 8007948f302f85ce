"""A scan is one pass: what it costs over a plain forward, as a ratio within one run."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.data.datasets import batches
from mlxfun.model.device.batch_size import CPU_BATCH
from mlxfun.scans import sample_routing
from mlxfun.scans.sample_routing import Sample

pytestmark = pytest.mark.bench
PAIRS = 7


def test_a_scan_costs_little_more_than_the_forwards_it_needs() -> None:
    """Alternating pairs, median of their ratios, so that clocks and neighbours weigh alike."""
    session = Session.open("demo")
    rng = np.random.default_rng(0)
    found = [Sample(rng.integers(5, 4000, 256).astype(np.int32)) for _ in range(8)]
    todo = batches([s.tokens for s in found], *CPU_BATCH)

    def plain() -> None:
        for batch in todo:
            mx.eval(session.model.model(mx.array(batch.tokens)))

    def scanned() -> None:
        sample_routing.scan(session.model, session.taps, found)

    def seconds(work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    plain(), scanned()
    ratios = [seconds(scanned) / seconds(plain) for _ in range(PAIRS)]
    ratio = statistics.median(ratios)
    print(f"scan / plain forward without the head: {ratio:.3f} (pairs {np.round(ratios, 2)})")
    session.close()
    assert ratio <= 1.3, "small model on a CPU; the budget of 1.1 is for larger ones"
