"""One warm program for the hostile tests of a worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.hostile.warm import Warm


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs of the program, in an empty directory."""
    if sys.platform != "linux":
        pytest.skip("forks a process that has imported MLX, and reads /proc")
    made = tmp_path_factory.mktemp("warm")
    (made / "here").mkdir()
    warm = Warm(made / "here", made / "home")
    yield warm
    warm.close()
