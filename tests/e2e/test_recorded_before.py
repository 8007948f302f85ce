"""Session files that earlier versions recorded still reproduce their states."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import Program

RECORDED = Path(__file__).with_name("recorded_format_1.mlxfun")


def test_a_session_of_format_1_ends_in_the_states_that_it_recorded(program: Program) -> None:
    """In it, undo after a steer takes back the prune, and the steering outlives undo and redo."""
    done = program.run("--headless", "--replay", str(RECORDED))
    assert done.returncode == 0, done.stderr
    assert "16 commands, 16 states as recorded" in done.stdout


def test_read_as_a_session_of_today_it_would_not(program: Program, tmp_path: Path) -> None:
    text = RECORDED.read_text("utf-8").replace("#!mlxfun-session 1", "#!mlxfun-session 2")
    (tmp_path / "today.mlxfun").write_text(text)
    done = program.run("--headless", "--replay", str(tmp_path / "today.mlxfun"))
    assert done.returncode == 1
    assert "expected state 25c4feeba5c9, found state 25c4feeba5c9 steered" in done.stderr


def test_what_is_recorded_while_it_is_replayed_replays_the_same_way(
    program: Program, tmp_path: Path
) -> None:
    again = tmp_path / "again.mlxfun"
    done = program.run("--headless", "--replay", str(RECORDED), "--record", str(again))
    assert done.returncode == 0, done.stderr
    done = program.run("--headless", "--replay", str(again))
    assert done.returncode == 0, done.stderr
