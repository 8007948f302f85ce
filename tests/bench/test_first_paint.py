"""How long a person looks at nothing: from starting the program to the first picture.

Run with `pytest -n 0 -m bench -s tests/bench/test_first_paint.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.terminal import Terminal

pytestmark = pytest.mark.bench

ROUNDS = 5
BUDGET = 0.5


def test_the_first_picture_is_there_in_half_a_second(tmp_path: Path) -> None:
    times = []
    for _ in range(ROUNDS):
        terminal = Terminal.shell("--demo", home=tmp_path, size=(80, 24))
        terminal.wait_for("experts")
        assert terminal.painted is not None
        times.append(terminal.painted - terminal.began)
        terminal.close()
    print(f"\nfirst paint: {', '.join(f'{t * 1000:.0f}' for t in times)} ms")
    # The best of several: the others measure what else the machine was doing.
    assert min(times) <= BUDGET
