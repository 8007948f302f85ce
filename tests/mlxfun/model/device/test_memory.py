"""The memory planner: what fits, what is said where it does not, and the bound of MLX's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfun.checkpoint.load import load
from mlxfun.errors import BudgetError
from mlxfun.model.device import memory
from mlxfun.model.device.memory import LEAST_CACHE, Need, bound_cache, fits, require
from tests.mlxfun import tiny_checkpoints as tiny

GIB = 1 << 30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine of 10 GiB of which 4 are in use; what the cache was bounded to."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "memory_limit", lambda: 10 * GIB)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 4 * GIB)
    monkeypatch.setattr(mx, "set_cache_limit", asked.append)
    return asked


def test_the_cache_gets_what_is_left_beside_the_model_and_the_work(limits: list[int]) -> None:
    bound_cache()
    require(2 * GIB, "the work", "do less")
    require(6 * GIB, "the work", "do less")  # nothing is left, and a little is needed to go on
    assert limits == [6 * GIB, 4 * GIB, LEAST_CACHE]


def test_a_refusal_says_all_figures_and_bounds_nothing(limits: list[int]) -> None:
    assert fits(6 * GIB)
    assert not fits(6 * GIB + 1)
    said = "the work needs about 7.0 GiB on top of 4.0 GiB in use, over the 10.0 GiB there are; do less"
    with pytest.raises(BudgetError) as refused:
        require(7 * GIB, "the work", "do less")
    assert str(refused.value) == said
    assert limits == []


def test_what_is_kept_for_convenience_goes_first(
    limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def let_go() -> None:
        monkeypatch.setattr(mx, "get_active_memory", lambda: 2 * GIB)

    require(7 * GIB, "the work", "do less", let_go)
    assert limits == [GIB]


def test_a_load_bounds_the_cache(tmp_path: Path, limits: list[int]) -> None:
    load(tiny.write(tmp_path / "m", tiny.QWEN3))
    assert limits[-1] == 6 * GIB


def test_an_edit_counts_its_layers_once_each_or_one_at_a_time() -> None:
    need = Need((3, 5, 4), work=100)
    assert (need.staged, need.straight, need.disk) == (112, 105, 12)
    assert Need((3, 5, 4), 100, both=True).disk == 24
    assert Need((), 7).straight == 7
