"""Pipes and devices in place of files: one sentence, at once, wherever a file is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlxfun.data import demo
from tests.e2e.conftest import Program, Shell, typed

LINES = (
    "collect --dataset {}",
    "evaluate --dataset {}",
    "stats load {}",
    "steer --config {}",
    "steer --safety-map {}",
    "prune --n-prune 2 --safety-map {}",
    "prune --expert-list {}",
    "safety-scan --harmful {} --benign demo:mixed --output r.json",
    "replay {}",
)


@pytest.mark.parametrize("name", ["pipe.jsonl", "/dev/zero", "many/of-them"])
def test_no_command_waits_for_a_pipe_or_reads_a_device(shell: Shell, name: str) -> None:
    os.mkfifo("pipe.jsonl")
    Path("many").mkdir()
    Path("many/of-them").symlink_to("/dev/zero")
    for line in LINES:
        before = shell.standing()
        error = shell.run(line.format(name)).error
        assert error is not None, line
        assert "a pipe or a device" in error, (line, error)
        assert shell.standing() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-x.safetensors", "notes"])
def test_a_model_directory_with_a_pipe_is_refused(shell: Shell, name: str) -> None:
    shutil.copytree(demo.model_path(), "model")
    Path("model", name).unlink(missing_ok=True)
    os.mkfifo(f"model/{name}")
    assert f"model/{name} is a pipe or a device" in shell.refused("load model")


def test_nor_does_the_program_start_with_one(program: Program) -> None:
    os.mkfifo(program.directory / "pipe")
    for words in (("--replay", "pipe"), typed(["replay pipe"])):
        done = program.run("--headless", *words, timeout=60)
        assert done.returncode in (1, 2)
        assert "a pipe or a device" in done.stderr
        assert "Traceback" not in done.stderr
