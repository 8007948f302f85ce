"""Session files that earlier versions recorded still reproduce their states."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Program, Shell

RECORDED = Path(__file__).with_name("recorded_format_1.mlxfun")


@pytest.fixture(scope="module")
def replayed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Program, subprocess.CompletedProcess[str]]:
    """A replay of it that is recorded in its turn, to again.mlxfun."""
    program = Program(tmp_path_factory.mktemp("replayed"))
    done = program.run("--headless", "--replay", str(RECORDED), "--record", "again.mlxfun")
    return program, done


def test_a_session_of_format_1_ends_in_the_states_that_it_recorded(
    replayed: tuple[Program, subprocess.CompletedProcess[str]],
) -> None:
    """In it, undo after a steer takes back the prune, and the steering outlives undo and redo."""
    _, done = replayed
    assert done.returncode == 0, done.stderr
    assert "16 commands, 16 states as recorded" in done.stdout


def test_read_as_a_session_of_today_it_would_not(shell: Shell, tmp_path: Path) -> None:
    text = RECORDED.read_text("utf-8").replace("#!mlxfun-session 1", "#!mlxfun-session 2")
    (tmp_path / "today.mlxfun").write_text(text)
    ended = shell.run("replay today.mlxfun")
    assert ended.error is not None
    assert "expected state 25c4feeba5c9, found state 25c4feeba5c9 steered" in ended.error


def test_what_is_recorded_while_it_is_replayed_replays_the_same_way(
    replayed: tuple[Program, subprocess.CompletedProcess[str]],
) -> None:
    program, done = replayed
    assert done.returncode == 0, done.stderr
    done = program.run("--headless", "--replay", "again.mlxfun")
    assert done.returncode == 0, done.stderr
