"""For all tests. They multiply small matrices, where the threads of a BLAS only get in each other's
way: with one thread the suite takes half as long. Set before NumPy is imported, and inherited.

Programs that a shell starts in the background ignore Ctrl-C, and so do their children: the tests
that interrupt one could then wait for ever. Here they listen, however the tests were started.
"""

import gc
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from commands.workbench import workbench

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
gc.disable()  # until all tests are collected: next to nothing of what that makes is garbage
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare the garbage collector what never becomes garbage: modules, classes, collected tests.

    A screen makes so many small objects that the collector, with its usual thresholds, spent a third
    of the time of the screen's tests on going over all of that again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """One collection and not five, as pytest has them at the end, over all that is still there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def what_is_frozen_stays_frozen() -> Iterator[None]:
    """The workbench freezes what a load has imported, and on closing sets free what is frozen, which
    here would be everything again. tests/e2e/test_memory_of_loads.py has it as it is.
    """
    quiet = SimpleNamespace(collect=gc.collect, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "gc", quiet)
        yield


@pytest.fixture
def real_freezing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The workbench freezes and unfreezes as it does for users."""
    monkeypatch.setattr(workbench, "gc", gc)
    yield
    gc.collect()
    gc.freeze()
