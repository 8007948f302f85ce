"""A model on disk takes the time of one in memory, and the memory of its largest layer.

Run with `pytest -n 0 -m bench tests/bench/test_streamed_cost.py -s`; the table is printed.
"""

from __future__ import annotations

from argparse import Namespace

import pytest
from bench import streamed
from random_model import Shape

STEPS = ("collect", "evaluate")
SHAPE = Shape(4, 128, 4, 512, 512, 8, 4, 64, 8192, bits=0)
"""Layers of 400 MB, beside which what a batch of 1,024 tokens computes is small."""


@pytest.mark.bench
def test_time_and_memory_of_streamed_passes(capsys, tmp_path) -> None:
    asked = Namespace(
        directory=tmp_path, samples=16, tokens=256, use=None, data=None, only=",".join(STEPS)
    )
    found = streamed.measured(asked, SHAPE)
    with capsys.disabled():
        print("\n" + streamed.table(found, lambda name: name in STEPS))
    bound = 1.3 * (found["none"]["largest"] + found["hidden"])
    for name in STEPS:
        assert found["none"][name]["peak"] <= bound, name
    seconds = [sum(found[mode][name]["seconds"] for name in STEPS) for mode in ("all", "none")]
    # Loading reads the weights of the one, and each pass those of the other.
    seconds[0] += found["all"]["load"]["seconds"]
    assert seconds[1] <= 1.1 * seconds[0]
