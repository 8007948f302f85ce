"""One warm program for the hostile tests of a worker."""

from __future__ import annotations

import pytest

from tests.hostile.kinds import good_files
from tests.hostile.spoiled import Place
from tests.hostile.warm import Warm
from tests.warm.programs import FORKS


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """Runs of the program, in an empty directory."""
    if not FORKS:
        pytest.skip("forks a process that has imported MLX, and reads /proc")
    made = tmp_path_factory.mktemp("warm")
    (made / "here").mkdir()
    return Warm(made / "here", made / "home")


@pytest.fixture(scope="module")
def place(warm: Warm) -> Place:
    """That, with a good file of each kind: their contents."""
    return warm, good_files(warm, warm.directory)
