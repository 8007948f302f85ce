"""The program on the bundled model: real weights, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SESSION = (
    "collect --dataset demo:mixed --max-samples 8",
    "prune --n-prune 4 --metric reap_sum",
    "preview --dataset demo:eval --max-samples 6",
    "apply",
    "undo",
    "redo",
    "save out",
)


def run(directory: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the program headless; its JSON lines. It must end well, the exit of the process too."""
    done = subprocess.run(
        [sys.executable, "-m", "commands.cli", "--headless", "--json", *arguments],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    # 134 would be MLX's streams, torn down while the process exits.
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("session")
    lines = [word for line in SESSION for word in ("-c", line)]
    return directory, run(directory, "--demo", "--seed", "1", "--record", "s.mlxfun", *lines)


def test_the_main_job_changes_the_state_and_comes_back_to_it(
    recorded: tuple[Path, list[dict[str, Any]]],
) -> None:
    found = recorded[1]
    assert [o["command"] for o in found] == ["load demo", *SESSION]
    loaded, collected, pruned, previewed, applied, undone, redone, saved = found
    assert loaded["state"] == collected["state"] == previewed["state"] == undone["state"]
    assert applied["state"] == redone["state"] == pruned["data"]["state_after"] != loaded["state"]
    assert loaded["data"]["experts"] == 16
    assert [len(kept) for kept in pruned["data"]["kept"].values()] == [12] * 6
    assert pruned["data"]["bytes_after"] < pruned["data"]["bytes_before"]
    assert previewed["data"]["kl_mean"] > 0
    assert saved["data"]["gate"]["load"] == "ok"
    assert "identical" in saved["data"]["gate"]["tensors"]
    assert (recorded[0] / "out" / "model.safetensors").stat().st_size <= saved["data"]["bytes"]
    assert previewed["data"]["perplexity"]["all"] > previewed["data"]["baseline"]["all"]


def test_a_replay_of_it_reproduces_every_state_and_the_figures(
    recorded: tuple[Path, list[dict[str, Any]]],
) -> None:
    directory, first = recorded
    second = run(directory, "--replay", "s.mlxfun")
    assert [(o["command"], o["state"]) for o in second[:-1]] == [
        (o["command"], o["state"]) for o in first
    ]
    assert second[-1]["data"]["compared"] == len(SESSION)
    output = Path(second[-1]["data"]["output_root"])
    weights = [root / "out" / "model.safetensors" for root in (directory, output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert second[3]["data"]["perplexity"] == first[3]["data"]["perplexity"]
