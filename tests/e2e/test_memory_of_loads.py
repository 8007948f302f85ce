"""After `load` the model before it is gone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfun.session.session import Session
from tests.e2e.conftest import Shell

MIB = 1 << 20


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_freezing: None) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    shell = Shell()
    yield shell
    shell.engine.close()


USED = (
    "collect --dataset demo:mixed --max-samples 4 --max-tokens 32",
    "prune --n-prune 4",
    "apply",
    "steer --activate 3:7",
    "chat --max-tokens 4 hello",
    "select --drop 0:3,1:3,2:3,3:3,4:3,5:3",
)


@pytest.mark.parametrize(
    "line", ["load demo", pytest.param("load demo --drop", marks=pytest.mark.slow)]
)
def test_three_loads_hold_as_much_as_one(own: Shell, line: str) -> None:
    """Each model is used in every way that could leave something of it behind."""
    gc.collect()
    before = mx.get_active_memory()
    own.do("load demo")
    one = mx.get_active_memory() - before
    assert one > 10 * MIB
    for _ in range(2):
        for used in USED:
            own.run(used)
        own.do(line)
    # Kernels and the like may add a little; a model is 12 MiB.
    assert mx.get_active_memory() - before < one + MIB
    assert mx.get_cache_memory() < 4 * MIB
    assert sum(isinstance(o, Session) for o in gc.get_objects()) <= 1


def test_with_drop_the_first_is_gone_before_the_second_is_read(
    own: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.checkpoint import load as module

    active = []
    real = module._require_memory

    def watched(*arguments: object) -> None:
        active.append(mx.get_active_memory())
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_require_memory", watched)
    own.do("load demo", *USED[:3], "load demo", *USED[:3], "load demo --drop")
    first, beside, dropped = active
    assert beside > first + 10 * MIB
    assert dropped < first + MIB


def test_where_both_do_not_fit_the_figures_and_drop_are_named(
    own: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.checkpoint import load
    from mlxfun.model.device import memory

    def limited(bytes_now) -> None:
        for module in (load, memory):
            monkeypatch.setattr(module, "memory_limit", bytes_now)

    others = mx.get_active_memory()  # of other tests in this process
    own.do("load demo")
    limited(lambda: mx.get_active_memory() + 4 * MIB)
    error = own.refused("load demo")
    assert "on top of" in error
    assert "free the loaded model first with load --drop" in error
    limited(lambda: others + 20 * MIB)
    own.do("load demo --drop")
