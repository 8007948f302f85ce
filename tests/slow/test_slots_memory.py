"""A model of 1.6 GB answers in a process that takes a third of that, with the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.slow

BENCH = ROOT / "tests" / "bench"
GIB = 1 << 30


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 32 experts of 6 MiB, float32, random."""
    path = tmp_path_factory.mktemp("large")
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\n"
        "from random_model import Shape, make\n"
        "make(Shape(8, 32, 4, 512, 1024, 8, 2, 64, 8192, bits=0), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(BENCH), str(path)], check=True, timeout=300)
    return path


def run(model: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCH / "slots_cost.py"), "--model", str(model), "--tokens", "16",
         "--prompt", "12", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def test_the_peak_of_the_process_is_that_of_the_slots(large: Path) -> None:
    whole = run(large, "--one", "whole")
    partly = run(large, "--one", "slots", "--slots", "4")
    assert partly["tokens"] == whole["tokens"]
    assert whole["peak"] > 1.6 * GIB
    # 0.2 GiB of slots, 0.05 besides, and what Python, MLX and mlx-lm take.
    assert partly["peak"] < 0.65 * GIB
    assert 0 < partly["hits"] < 1
