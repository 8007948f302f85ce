"""Batches fit the device and the memory that is free, and are halved where they turn out too large."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun.context import Context
from mlxfun.errors import BudgetError
from mlxfun.model.device import batch_size as module
from mlxfun.model.device.batch_size import batch_size, bytes_per_token, each_batch

SEQUENCES = [np.full(length, length, np.int32) for length in (7, 3, 12, 12, 5, 9, 30, 1)]


class Heard(Context):
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event) -> None:
        self.said.append(event.text)


def test_on_cuda_tokens_times_top_k_stay_below_the_grid(rig, monkeypatch) -> None:
    r = rig("qwen3_moe")
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    monkeypatch.setattr(module, "free_bytes", lambda: 1 << 40)
    assert batch_size(r.model, r.anatomy, tokens=1 << 20).tokens == 65_535 // 2


@pytest.mark.parametrize("free", [0, 1 << 20, 4 << 20])
def test_less_is_taken_where_less_is_free(rig, monkeypatch, free: int) -> None:
    r = rig("qwen3_moe")
    monkeypatch.setattr(module, "free_bytes", lambda: free)
    size = batch_size(r.model, r.anatomy)
    assert size.tokens == max(64, int(0.8 * free) // bytes_per_token(r.model, r.anatomy))
    assert size.tokens < 2048
    assert f"{size.tokens:,} tokens" in size.summary()


def test_a_failed_batch_is_halved_and_every_row_is_seen_once() -> None:
    todo = module.batches(SEQUENCES, 100, 8)
    seen: list[int] = []

    def work(batch) -> int:
        if batch.tokens.size > 30:
            raise RuntimeError("[malloc] Unable to allocate 999 bytes.")
        for row, tokens, mask in zip(batch.rows, batch.tokens, batch.mask, strict=True):
            np.testing.assert_array_equal(tokens[mask], SEQUENCES[row])
            seen.append(row)
        return len(batch.rows)

    heard = Heard()
    assert sum(count for _, count in each_batch(todo, work, heard)) == len(SEQUENCES)
    assert sorted(seen) == list(range(len(SEQUENCES)))
    # Once a process the kind of BLAS is told ahead of it.
    assert any("going on with batches of at most" in said for said in heard.said)


def test_one_row_that_does_not_fit_is_an_error_with_the_remedy() -> None:
    def work(batch) -> None:
        raise MemoryError("no")

    with pytest.raises(BudgetError, match=r"one sequence of \d+ tokens .* lower --max-tokens"):
        list(each_batch(module.batches(SEQUENCES, 100, 8), work))


def test_other_failures_pass() -> None:
    def work(batch) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(each_batch(module.batches(SEQUENCES, 100, 8), work))
