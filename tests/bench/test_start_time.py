"""How long a person waits: for --help, and for the commands to be known. Wall time of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.bench


def python(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=60
    )


def test_help_is_there_within_a_fifth_of_a_second(benchmark: Any) -> None:
    benchmark.pedantic(python, ("-m", "commands.cli", "--help"), rounds=10, warmup_rounds=1)
    assert benchmark.stats.stats.min < 0.2


def test_all_commands_are_declared_within_a_fifth_of_a_second(benchmark: Any) -> None:
    benchmark.pedantic(
        python, ("-c", "import commands.engine; commands.engine.Engine().help(None)"),
        rounds=10, warmup_rounds=1,
    )  # fmt: skip
    assert benchmark.stats.stats.min < 0.2
