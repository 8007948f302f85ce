"""How long a person looks at nothing: from starting the program to the first picture.

Run with `pytest -m bench -s tests/bench/test_first_paint.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.tui.terminal import Terminal

pytestmark = pytest.mark.bench

ROUNDS = 5
BUDGET = 0.5


def test_the_first_picture_is_there_in_half_a_second(tmp_path: Path) -> None:
    times = []
    for _ in range(ROUNDS):
        terminal = Terminal("--demo", size=(80, 24), home=tmp_path)
        terminal.wait_for("experts")
        times.append(time.monotonic() - terminal.began)
        terminal.leave()
    print(f"\nfirst paint: {', '.join(f'{t * 1000:.0f}' for t in times)} ms")
    # The best of several: the others measure what else the machine was doing.
    assert min(times) <= BUDGET
