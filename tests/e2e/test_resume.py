"""A session that is killed comes back: same states, nothing collected or written twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.e2e.conftest import Program, typed
from tests.warm.programs import SHELL, command

ROOT = Path(__file__).resolve().parents[2]
LINES = (
    "collect --dataset demo:mixed --max-samples 6 --max-tokens 48",
    "prune --n-prune 4",
    "apply",
    "steer --activate 3:7",
    "save out",
    "prune --n-prune 2 --allow-stale",
    "chat --max-tokens 100000 a word",
)


def start(here: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here / "state"),
        "XDG_CACHE_HOME": str(here / "cache"),
    }  # fmt: skip
    return subprocess.Popen(
        [*command(SHELL), *arguments],
        cwd=here, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kept(here: Path) -> list[Path]:
    return sorted(here.glob("state/**/sessions/*.mlxfun"))


def killed_session(here: Path) -> str:
    """Kill a session in the middle of its last command; returns what it had kept."""
    process = start(here, "--plain", "--demo")
    assert process.stdin is not None
    process.stdin.write("\n".join(LINES) + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + 90
    text = ""
    while not text.endswith("a word\n"):
        assert time.monotonic() < deadline, text
        assert process.poll() is None
        time.sleep(0.05)
        text = "".join(path.read_text() for path in kept(here))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return text


def test_a_session_that_was_killed_is_resumed_where_it_stood(tmp_path: Path) -> None:
    text = killed_session(tmp_path)
    states = [line for line in text.splitlines() if line.startswith("#= ")]
    (tmp_path / "out" / "mine").write_text("not to be touched")
    process = start(tmp_path, "--headless", "--json", "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ran = [json.loads(line) for line in out.splitlines()]
    report = ran[-1]["data"]
    assert report["commands"] == 5
    assert report["passed"] == 1
    assert report["cut"] == LINES[-1]
    assert ran[-1]["state"] == states[-1].split()[2]
    plan = next(one for one in ran if one["command"] == LINES[5])
    assert plan["data"]["state_after"] == states[-1].split()[4]
    collected = next(one for one in ran if one["command"] == LINES[0])
    assert collected["data"]["tokens_per_second"] == 0, "it was collected again"
    assert collected["data"]["held_out"] > 0
    assert (tmp_path / "out" / "mine").read_text() == "not to be touched"
    assert kept(tmp_path) == []


def test_a_session_that_ends_as_it_should_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "--plain", "--demo", "-c", LINES[0])
    _, err = process.communicate("quit\n", timeout=120)
    assert process.returncode == 0, err
    assert list(tmp_path.glob("state/**/sessions/*")) == []
    process = start(tmp_path, "--headless", "--resume")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no session was cut short" in err


def test_a_session_that_saved_to_an_absolute_path_replays_to_its_end(program: Program) -> None:
    target = program.directory / "made" / "model"
    lines = typed(("load demo", f"save {target}"))
    first = program.run("--headless", "--record", "s.mlxfun", *lines)
    assert first.returncode == 0, first.stderr
    before = {p.name: p.stat().st_mtime_ns for p in target.iterdir()}
    again = program.run("--headless", "--replay", "s.mlxfun", "--output-root", "root")
    assert again.returncode == 0, again.stderr
    laid = program.directory / "root" / target.relative_to("/")
    assert {p.name for p in laid.iterdir()} == set(before)
    assert {p.name: p.stat().st_mtime_ns for p in target.iterdir()} == before
