"""Standard streams that are closed or full, and Ctrl-C before the program has begun."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm.programs import STUB, command

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "headless": ("--headless --demo -c info -c layers", 0),
    "json": ("--headless --json --demo -c info", 0),
    "a command that fails": ("--headless --demo -c undo", 1),
    "a line that is wrong": ("--headless --demo -c nonsense", 2),
    "a wrong option": ("--headless --nonsense", 2),
    "help": ("--help", 0),
    "version": ("--version", 0),
    "plain": ("--plain --demo -c info", 0),
    "plain, recorded": ("--plain --demo -c info --record s.mlxfun", 0),
}
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">&- 2>&-", "2>/dev/full", "<&- 2>/dev/full")


def run(here: Path, arguments: str, streams: str, **names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"exec {shlex.join(command(STUB))} {arguments} {streams}"],
        cwd=here, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here / "state"), **names},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "streams"),
    [*((name, "<&- >&- 2>&-") for name in RUNS), *(("plain, recorded", how) for how in CLOSED),
     ("help", ">&-"), ("a wrong option", "2>&-"), ("a wrong option", "2>/dev/full")],
)  # fmt: skip
def test_a_closed_stream_changes_no_exit_code(here: Path, name: str, streams: str) -> None:
    arguments, code = RUNS[name]
    done = run(here, arguments, streams)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "record" in name:  # nothing printed got into a file that has the number of a closed stream
        assert "info\n#= state" in (here / "s.mlxfun").read_text()
        assert "note:" not in (here / "s.mlxfun").read_text()


@pytest.mark.parametrize(
    ("name", "streams"),
    [*((name, ">/dev/full") for name in RUNS), ("plain", ">/dev/full <&-"),
     ("headless", ">/dev/full 2>&-"), ("headless", ">/dev/full 2>/dev/full")],
)  # fmt: skip
def test_results_that_cannot_be_written_are_one_line_and_a_failure(
    here: Path, name: str, streams: str
) -> None:
    arguments, code = RUNS[name]
    done = run(here, arguments, streams)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == (code or 1), done.stderr
    if code == 0 and "2>" not in streams:
        said = [line for line in done.stderr.splitlines() if "standard output" in line]
        assert said == ["mlxfun-shell: cannot write to standard output: No space left on device"]


@pytest.mark.parametrize(("code", "streams", "expected"), [
    (0, ">/dev/full", 1), (2, ">/dev/full", 2), (0, ">/dev/full 2>&-", 1), (0, "", 0),
])  # fmt: skip
def test_what_is_lost_at_the_last_flush_is_said_too(
    here: Path, code: int, streams: str, expected: int
) -> None:
    """Whoever wrote it, and left it in the buffer: the interpreter would end with 120."""
    done = run(here, "", streams, STUB_UNFLUSHED=str(code))
    assert done.returncode == expected, done.stderr
    said = "mlxfun-shell: cannot write to standard output: No space left on device\n"
    assert done.stderr == (said if streams == ">/dev/full" and code == 0 else "")
    assert done.stdout == ("" if streams else "a result\n")


def test_the_screen_needs_the_stream_that_it_is_drawn_on(here: Path) -> None:
    done = subprocess.run(
        ["script", "-qec", f"{shlex.join(command(STUB))} --demo 2>err.txt", "/dev/null"],
        cwd=here, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here / "state")},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no terminal to draw on" in (here / "err.txt").read_text()


@pytest.mark.parametrize("module", ["click", "tomllib", "shlex", "rich.console"])
def test_an_interrupt_while_something_is_imported_is_no_traceback(here: Path, module: str) -> None:
    name = module.partition(".")[0]
    (here / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "commands", "--headless", "-c", "help"],
        cwd=here, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": f"{here}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr in ("", "interrupted; nothing is left half done\n")
