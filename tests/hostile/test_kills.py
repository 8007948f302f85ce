"""Killed at any operation on a file, a command that writes leaves the old file or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = "#!mlxfun-session 2\n#: seed 5\ninfo\n"
WRITERS = {
    "report": (("-c", "export report out.md --force"), "out.md", "# Session report"),
    "recording": (("--record", "out.mlxfun", "-c", "info"), "out.mlxfun", "#!mlxfun-session 2"),
    "second recording": (("-c", "record out.mlxfun", "-c", "info"), "out.mlxfun", "#!mlxfun"),
    "recipe": (("-c", "recipe r.recipe --output out"), "out/report.json", '{\n  "recipe"'),
}
"""What writes, its file, and how a new one begins."""
OLD_TEXT = {"out/report.json": '{"variants": []}\n'}


def run(here: Path, kill_at: int, words: tuple[str, ...]) -> int:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/hostile/kill_program.py"), "--headless", "--demo",
         "-c", "collect --dataset demo:mixed --max-samples 2", *words],
        cwd=here, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here.parent / "state"),
             "XDG_CACHE_HOME": str(here.parent / "cache"), "KILL_AT": str(kill_at),
             "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def kill_at_each(here: Path, name: str, most: int) -> int:
    """Kill the writer at its first, second, ... operation; how many kills there were."""
    words, file, beginning = WRITERS[name]
    old = OLD_TEXT.get(file, OLD)
    for kill_at in range(1, most + 1):
        here.mkdir()
        (here / "r.recipe").write_text("at most 9 GB\ntry prune --n-prune 1\n")
        (here / file).parent.mkdir(exist_ok=True)
        (here / file).write_text(old)
        code = run(here, kill_at, words)
        found = {str(p.relative_to(here)): p.read_text() for p in here.rglob("*") if p.is_file()}
        # An older recording is moved aside before the new one begins.
        whole = [found.get(file, ""), found.get(f"{file}.1", "")]
        assert old in whole or whole[0].startswith(beginning), (kill_at, found)
        if name.endswith("recording"):
            assert old in whole, (kill_at, found)
        if code == 0:
            assert not [p for p in found if "partial" in p]
            return kill_at - 1
        run(here, 0, words)
        assert not list(here.rglob("*.partial")), kill_at
        assert (here / file).read_text().startswith(beginning)
        here.rename(here.with_name(f"{here.name}-{kill_at}"))
    return most


@pytest.mark.parametrize("name", ["report"])
def test_a_few_kills(tmp_path: Path, name: str) -> None:
    assert kill_at_each(tmp_path / "here", name, 3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_kills(tmp_path: Path, name: str) -> None:
    assert kill_at_each(tmp_path / "here", name, 40) >= 2
