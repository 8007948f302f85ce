"""What a script sees: exit codes, one line on stderr, one JSON object, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Program, typed


def sentence(program: Program, code: int, *arguments: str) -> str:
    """The only line of complaint of a run that ends with `code`."""
    done = program.run("--headless", "--json", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"command", "ok", "state", "seconds", "report", "data", "error"}
    assert found["ok"] is False
    complaints = [line for line in done.stderr.splitlines() if found["error"] in line]
    assert len(complaints) == 1
    return str(found["error"])


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        (1, "apply", "nothing is staged to apply; stage a plan first, e.g. with prune"),
        (2, "aply", "unknown command 'aply': did you mean apply?; type help for a list"),
        (1, "prune --expert-list gone.json",
         "cannot read gone.json: No such file or directory; check the path"),
        (2, "prune --n-prune x",
         "prune: invalid value for '--n-prune': 'x' is not a valid integer"),
    ],
)  # fmt: skip
def test_a_failed_command_is_1_and_a_misused_one_2(
    program: Program, code: int, line: str, message: str
) -> None:
    assert sentence(program, code, "--demo", *typed([line, "save out"])) == message
    assert not (program.directory / "out").exists()


def test_a_model_that_is_none_is_1_and_nothing_is_written(program: Program) -> None:
    (program.directory / "m").mkdir()
    assert sentence(program, 1, "m", "-c", "save out") == (
        "m is not a model directory: it has no config.json"
    )
    assert [p.name for p in program.directory.iterdir()] == ["m"]


def test_a_malformed_replay_line_is_2_with_file_and_line(program: Program) -> None:
    Path(program.directory / "s.mlxfun").write_text("#: seed 1\ncollect --dataset\n")
    assert sentence(program, 2, "--replay", "s.mlxfun") == (
        "s.mlxfun:2: collect: option '--dataset' requires an argument"
    )
