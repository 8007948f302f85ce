"""Ctrl-C at any moment: exit code 130, one sentence, whole models or none, nothing hidden left."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.e2e.conftest import Program, typed

SAVES = 40
LINES = (
    "collect --dataset demo:mixed --max-samples 32 --max-tokens 64",
    "prune --n-prune 4",
    "apply",
    # So many that the interrupt falls into one of them, at whatever point of it.
    *(f"save out{number}" for number in range(SAVES)),
)

SLOW = pytest.mark.slow


def listen(process: subprocess.Popen[str], until: str) -> str:
    """Read stderr until `until` is in it. A program that ends before is no endless wait."""
    assert process.stderr is not None
    said = ""
    while until not in said:
        line = process.stderr.readline()
        if not line:
            process.kill()
            process.communicate()
            raise AssertionError(f"{until!r} did not come, but {said!r}")
        said += line
    return said


def interrupted(program: Program, until: str, number: int = signal.SIGINT) -> tuple[list[str], str]:
    """Interrupt once `until` is on stderr; the commands that had ended, and all of stderr."""
    process = program.start("--headless", "--json", "--demo", "--record", "s", *typed(LINES))
    said = listen(process, until)
    began = time.monotonic()
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 128 + number
    assert time.monotonic() - began < 10
    return [json.loads(line)["command"] for line in out.splitlines()], said + err


def leftovers(directory: Path) -> set[str]:
    """Names in `directory` apart from the recording; every saved model is a whole one."""
    found = {p.name for p in directory.iterdir()} - {"s"}
    for name in found:
        with safe_open(directory / name / "model.safetensors", "numpy") as file:
            assert len(list(file.keys())) == 74
        assert json.loads((directory / name / "config.json").read_text())["num_experts"] == 12
    return found


@pytest.mark.parametrize(
    "until", ["importing MLX", pytest.param("load: ", marks=SLOW), "calibrating: "]
)
def test_ctrl_c_before_anything_is_saved_leaves_nothing(tmp_path: Path, until: str) -> None:
    program = Program(tmp_path, cold=until == "importing MLX")
    _, said = interrupted(program, until)
    assert said.splitlines()[-1] == "interrupted; nothing is left half done"
    assert "Traceback" not in said
    assert leftovers(program.directory) == set()


@pytest.mark.parametrize(
    "until",
    [pytest.param("save: ", marks=SLOW), pytest.param("gate: tensors", marks=SLOW), "gate: logits"],
)
def test_ctrl_c_while_saving_leaves_whole_models_only(program: Program, until: str) -> None:
    ended, said = interrupted(program, until)
    assert said.splitlines()[-1] == "interrupted; nothing is left half done"
    assert "Traceback" not in said
    saved = leftovers(program.directory)
    assert len(saved) < SAVES
    # The last one may have been cancelled: then it has a line of output and no directory.
    reported = {line.partition(" ")[2] for line in ended if line.startswith("save ")}
    assert saved <= reported
    assert len(reported - saved) <= 1


def test_a_kill_while_saving_is_cleaned_up_by_the_next_save(program: Program) -> None:
    process = program.start("--headless", "--demo", *typed(LINES))
    listen(process, "save: ")
    process.kill()
    process.communicate(timeout=30)
    done = program.run("--headless", "--demo", "-c", "save next")
    assert done.returncode == 0, done.stderr
    assert not [p for p in program.directory.iterdir() if p.name.startswith(".")]
