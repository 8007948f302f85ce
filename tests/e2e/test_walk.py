"""The session file that uses every command, which the README takes its examples from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from commands.reference import ELSEWHERE, WALK
from commands.registry import COMMANDS, command_of
from tests.warm.programs import SHELL, command

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line
    for line in (ROOT / WALK).read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]


def test_it_uses_every_command_that_a_session_file_may_hold() -> None:
    used = {command_of(line) for line in LINES}
    assert set(COMMANDS) - used - set(ELSEWHERE) == set()
    assert len([line for line in LINES if line.startswith("expect ")]) >= 15


def test_it_runs_to_its_end_and_what_it_expects_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(*command(SHELL), "--headless", "--json"),
            *("--replay", str(ROOT / WALK), "--output-root", str(tmp_path)),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert ran[-1]["command"].startswith("replay ")
    assert [one["command"] for one in ran[1:-1]] == LINES
    failed = [one["command"] for one in ran if not one["ok"]]
    assert failed == [
        "apply",
        "prune --n-prune 4 --budget global",
        "prune --n-prune 2 --expert-list kept.json",
        "tasks no-such-task",
    ]
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_recipe_of_the_readme_keeps_its_best_variant_and_saves_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(*command(SHELL), "--headless", "--json"),
            *("-c", ELSEWHERE["recipe"], "--output-root", str(tmp_path)),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])["data"]
    kept = report["variants"][report["kept"]]
    within = [v for v in report["variants"] if v["bytes"] <= 5_300_000]
    assert kept["kl"] == min(v["kl"] for v in within)
    assert len(report["variants"]) > len(within) > 1
    assert (tmp_path / "small" / "config.json").is_file()
    assert (tmp_path / "small-report" / "loss.svg").read_text().startswith("<?xml")
