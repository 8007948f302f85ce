"""The whole shell, real model and all, in a real terminal, by keys alone."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun import demo
from tests.tui.terminal import Terminal

pytestmark = pytest.mark.slow

# Letters that nothing on the screen contains: if one appears, it was typed.
STRANGE = "жщфюэъыйцбгд"
RESTORED = "\x1b[?1049l"


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[list[Terminal]]:
    """Terminals that are put away whatever happens."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.end()


def start(shells: list[Terminal], tmp_path: Path, size: tuple[int, int], *more: str) -> Terminal:
    terminal = Terminal("--demo", *more, size=size, home=tmp_path)
    shells.append(terminal)
    terminal.wait_for("parameters")
    return terminal


@pytest.mark.parametrize("size", [(80, 24), (160, 45)])
def test_calibrate_prune_preview_apply_undo_and_save_by_keys_alone(
    shells: list[Terminal], tmp_path: Path, size: tuple[int, int]
) -> None:
    record = tmp_path / "session.mlxfun"
    shell = start(shells, tmp_path, size, "--record", str(record), "--output-root", str(tmp_path))
    shell.send("c")
    shell.rest(0.3)
    shell.send(" --max-samples 12\r")
    shell.wait_for("of the experts seen")
    for keys, text in (
        ("p", "prune --n-prune 4"),
        ("\r", "24 experts go"),
        ("v", "same next token"),
        ("a", "apply: prune"),
        ("u", "undo: prune"),
        ("r", "redo: prune"),
        ("s", "save out"),
        ("\r", "saved"),
    ):
        shell.send(keys)
        shell.wait_for(text, 60.0)
    code, _ = shell.leave()
    assert code == 0
    lines = [ln for ln in record.read_text().splitlines() if ln and not ln.startswith("#")]
    assert [line.split()[0] for line in lines] == [
        "collect", "prune", "preview", "apply", "undo", "redo", "save",
    ]  # fmt: skip
    assert (tmp_path / "out" / "config.json").exists()


def test_the_keys_of_the_users_configuration_are_named_and_work(
    shells: list[Terminal], tmp_path: Path
) -> None:
    config = tmp_path / "keys.toml"
    config.write_text('[keys]\ncollect = "f5"\nprune = "["\npick_fewer = ""\napply = "ctrl+g"\n')
    shell = start(shells, tmp_path, (160, 45), "--config", str(config))
    shell.rest(0.5)
    for keys, text in (
        ("\x1b[15~", "collect --dataset demo:mixed"),
        (" --max-samples 12\r", "of the experts seen"),
        ("[", "prune --n-prune 4"),
        ("\r", "24 experts go"),
        ("v", "same next token"),
        ("\x07", "apply: prune"),
        (":apply ", "--max-kl"),
        ("\x1bOP", "Key ctrl+g; undo takes it back."),
    ):
        shell.send(keys)
        shell.wait_for(text, 60.0)
        shell.rest(0.3)
    assert {"F5 calibrate", "[ prune", "^g apply"} <= set(re.split(" {2,}", shell.text))
    assert shell.leave()[0] == 0


def test_typing_is_echoed_at_once_while_a_calibration_runs(
    shells: list[Terminal], tmp_path: Path
) -> None:
    # Long enough that a fast machine is still calibrating when the last letter is typed.
    (tmp_path / "long.jsonl").write_bytes(demo.dataset_path("mixed").read_bytes() * 12)
    shell = start(shells, tmp_path, (160, 45))
    shell.send(f":collect --dataset {tmp_path / 'long.jsonl'}\r")
    shell.wait_for("samples/s")
    shell.send("i")
    shell.rest(0.3)
    gaps = []
    for letter in STRANGE:
        shell.send(letter)
        gaps.append(shell.wait_for(letter, 5.0))
        shell.rest(0.1)
    assert "of the experts seen" not in shell.text, "the calibration was over before the typing"
    assert max(gaps) < 0.1, [f"{gap * 1000:.0f} ms" for gap in gaps]


def test_a_calibration_is_cancelled_by_two_escapes(shells: list[Terminal], tmp_path: Path) -> None:
    shell = start(shells, tmp_path, (80, 24))
    shell.send("c")
    shell.rest(0.3)
    shell.send("\r")
    shell.wait_for("samples/s")
    shell.send("\x1b")
    shell.wait_for("esc again cancels")
    shell.send("\x1b")
    shell.wait_for("cancelled after", 5.0)
    assert shell.leave()[0] == 0


def test_leaving_in_the_middle_of_a_job_is_quick_and_restores_the_terminal(
    shells: list[Terminal], tmp_path: Path
) -> None:
    shell = start(shells, tmp_path, (80, 24))
    shell.send("c")
    shell.rest(0.3)
    shell.send("\r")
    shell.wait_for("samples/s")
    code, seconds = shell.leave()
    assert code == 0
    assert seconds < 3.0
    assert RESTORED in shell.output.decode("utf-8", "replace")


def test_a_terminate_signal_restores_the_terminal(shells: list[Terminal], tmp_path: Path) -> None:
    shell = start(shells, tmp_path, (80, 24))
    os.kill(shell.pid, signal.SIGTERM)
    code, _ = shell.leave("")
    assert code == 128 + signal.SIGTERM
    assert RESTORED in shell.output.decode("utf-8", "replace")
    assert "Traceback" not in shell.text
