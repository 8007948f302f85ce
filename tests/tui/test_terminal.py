"""The whole shell, real model and all, in a real terminal, by keys alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxfun.data import demo
from tests.terminal import Terminal

pytestmark = pytest.mark.slow

# Letters that nothing on the screen contains: if one appears, it was typed.
STRANGE = "жщфюэъыйцбгд"
RESTORED = b"\x1b[?1049l"
ESCAPE, CTRL_Q, KILL_LINE = "\x1b", "\x11", "\x15"
STATE = r"state ([0-9a-f]{8})"
MOST_GAP = 0.100

Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Opens shells in terminals of any size; they are put away whatever happens."""
    opened: list[Terminal] = []

    def start(*arguments: str, size: tuple[int, int] = (120, 40)) -> Terminal:
        terminal = Terminal.shell(*arguments, home=tmp_path, size=size)
        opened.append(terminal)
        terminal.wait_for("the session is back" if "--resume" in arguments else "parameters")
        return terminal

    yield start
    for terminal in opened:
        terminal.close()


def enter(shell: Terminal, line: str) -> None:
    """Type a command and run it."""
    shell.type(f":{KILL_LINE}{line}\r")


def state(shell: Terminal) -> str:
    """The identity of the committed weights that the status line shows."""
    return shell.wait_for(STATE)[1]


def leave(shell: Terminal, *, losing: str = "") -> int:
    """Leave. losing: what is asked about first."""
    time.sleep(0.3)  # right behind an escape it would be another key
    shell.type(CTRL_Q)
    if losing:
        shell.wait_for(losing)
        shell.type(CTRL_Q)
    return shell.end()


@pytest.mark.parametrize("size", [(80, 24), (160, 45)])
def test_calibrate_prune_preview_apply_undo_and_save_by_keys_alone(
    start: Start, tmp_path: Path, size: tuple[int, int]
) -> None:
    record = tmp_path / "session.mlxfun"
    shell = start("--demo", "--record", str(record), "--output-root", str(tmp_path), size=size)
    shell.type("c")
    shell.wait_for("collect --dataset demo:mixed")
    shell.type(" --max-samples 12\r")
    shell.wait_for("of the experts seen")
    for keys, text in (
        ("p", "prune --n-prune 4"),
        ("\r", "24 experts pruned"),
        ("v", "top-1 agreement"),
        ("a", "apply: prune"),
        ("u", "undo: prune"),
        ("r", "redo: prune"),
        ("s", "save out"),
        ("\r", "saved"),
    ):
        shell.type(keys)
        shell.wait_for(text)
    assert leave(shell) == 0
    assert f"--replay {record}".encode() in shell.output, "how to repeat it is the last word"
    lines = [ln for ln in record.read_text().splitlines() if ln and not ln.startswith("#")]
    assert [line.split()[0] for line in lines] == [
        "collect", "prune", "preview", "apply", "undo", "redo", "save",
    ]  # fmt: skip
    assert (tmp_path / "out" / "config.json").exists()


def test_the_keys_of_the_users_configuration_are_named_and_work(
    start: Start, tmp_path: Path
) -> None:
    config = tmp_path / "keys.toml"
    config.write_text('[keys]\ncollect = "f5"\nprune = "["\npick_fewer = ""\napply = "ctrl+g"\n')
    shell = start("--demo", "--config", str(config), size=(160, 45))
    shell.wait_for("F5 calibrate  ")
    for keys, text in (
        ("\x1b[15~", "collect --dataset demo:mixed"),
        (" --max-samples 12\r", "of the experts seen"),
        ("[", "prune --n-prune 4"),
        ("\r", "24 experts pruned"),
        ("v", "top-1 agreement"),
        ("\x07", "apply: prune"),
        (":apply ", "--max-kl"),
        ("\x1bOP", r"Key ctrl\+g; undo takes it back\."),
    ):
        shell.type(keys)
        shell.wait_for(text)
        if text == "top-1 agreement":
            shell.wait_for(r"\^g apply  ")
    shell.type(ESCAPE)
    assert leave(shell, losing="the edits are not saved") == 0


def test_typing_is_echoed_at_once_while_a_calibration_runs(start: Start, tmp_path: Path) -> None:
    # Long enough that a fast machine is still calibrating when the last letter is typed.
    (tmp_path / "long.jsonl").write_bytes(demo.dataset_path("mixed").read_bytes() * 12)
    shell = start("--demo", size=(160, 45))
    enter(shell, "collect --dataset long.jsonl")
    shell.wait_for("samples/s")
    shell.type("i")
    time.sleep(0.3)
    gaps = []
    for letter in STRANGE:
        gaps.append(shell.echo(letter))
        time.sleep(0.1)
    assert "of the experts seen" not in shell.text(), "it was over before the typing"
    assert max(gaps) < MOST_GAP, [f"{gap * 1000:.0f} ms" for gap in gaps]


def test_a_calibration_is_cancelled_by_two_escapes(start: Start) -> None:
    shell = start("--demo", size=(80, 24))
    enter(shell, "collect --dataset demo:mixed")
    shell.wait_for("samples/s")
    shell.type(ESCAPE)
    shell.wait_for("esc again cancels")
    shell.type(ESCAPE)
    shell.wait_for("cancelled after", 5.0)
    assert leave(shell) == 0


def test_leaving_in_the_middle_of_a_job_is_quick_and_restores_the_terminal(start: Start) -> None:
    shell = start("--demo", size=(80, 24))
    enter(shell, "collect --dataset demo:mixed")
    shell.wait_for("samples/s")
    began = time.monotonic()
    assert leave(shell) == 0
    assert time.monotonic() - began < 3.0
    assert RESTORED in shell.output


def test_a_terminate_signal_restores_the_terminal(start: Start) -> None:
    shell = start("--demo", size=(80, 24))
    os.kill(shell.process.pid, signal.SIGTERM)
    assert shell.end() == 128 + signal.SIGTERM
    assert RESTORED in shell.output
    assert b"Traceback" not in shell.output


def test_a_shell_killed_in_the_middle_of_an_edit_comes_back_with_history_and_plan(
    start: Start,
) -> None:
    shell = start("--demo")
    untouched = state(shell)
    enter(shell, "collect --dataset demo:mixed --max-samples 12")
    shell.wait_for("of the experts seen")
    enter(shell, "prune --n-prune 2")
    shell.wait_for("16 -> 14")
    shell.type("a")
    shell.wait_for("apply: prune")
    pruned = shell.wait_for(rf"state (?!{untouched})([0-9a-f]{{8}})")[1]
    enter(shell, "prune --n-prune 1 --allow-stale")
    shell.wait_for("14 -> 13")
    enter(shell, "merge --n-prune 2 --dataset demo:mixed --refit-experts")
    shell.wait_for("merging")
    shell.process.kill()
    assert shell.end() == -signal.SIGKILL

    again = start("--resume")
    again.wait_for(f"state {pruned}")
    again.wait_for("14 → 13 per layer")  # the second prune is staged as it was
    again.type("d")
    again.wait_for("discard")
    again.type("u")
    again.wait_for("undo: prune")
    again.wait_for(f"state {untouched}")
    assert leave(again) == 0
