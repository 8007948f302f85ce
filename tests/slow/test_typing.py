"""The real screen in a terminal, on the trained model: it echoes, cancels and leaves at once."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slow.conftest import Shared
from tests.terminal import Terminal

pytestmark = pytest.mark.slow

# Letters that the screen draws nowhere by itself.
LETTERS = "".join(map(chr, (*range(0x430, 0x450), *range(0x3B1, 0x3CA), *range(0x561, 0x587))))
LETTERS = LETTERS.replace("\u03c2", "").replace("λ", "").replace("μ", "").replace("σ", "")
MOST_GAP = 0.100
CALIBRATIONS = 3
KILL_LINE = "\x15"
CTRL_C, CTRL_Q, ESCAPE = "\x03", "\x11", "\x1b"
STATE = r"state ([0-9a-f]{8})"


@pytest.fixture
def terminal(shared: Shared, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal.shell(str(shared.model), home=tmp_path)
    yield terminal
    terminal.close()


def state(terminal: Terminal) -> str:
    """The committed state that the status line shows."""
    return terminal.wait_for(STATE)[1]


def enter(terminal: Terminal, line: str) -> None:
    """Type a command on the command line and run it."""
    terminal.type(ESCAPE)
    time.sleep(0.2)  # a lone escape, not the beginning of an escape sequence
    terminal.type(":")
    time.sleep(0.2)
    terminal.type(f"{KILL_LINE}{line}\r")


def run(terminal: Terminal, line: str, until: str, seconds: float = 120.0) -> None:
    enter(terminal, line)
    terminal.wait_for(until, seconds)
    idle(terminal)


def clear(terminal: Terminal, seconds: float = 10.0) -> None:
    """Empty the field that is typed in, and wait until it is."""
    terminal.type(KILL_LINE)
    deadline = time.monotonic() + seconds
    while set(LETTERS) & set(terminal.text()):
        assert time.monotonic() < deadline, terminal.text()
        time.sleep(0.02)


def idle(terminal: Terminal, seconds: float = 120.0) -> None:
    """Wait until no job is running."""
    deadline = time.monotonic() + seconds
    while "▶" in terminal.text():
        assert time.monotonic() < deadline, terminal.text()
        time.sleep(0.02)


def test_typing_is_echoed_at_once_throughout_every_calibration(
    terminal: Terminal, shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(terminal)
    # More than one: what a job leaves behind when it ends must not be in the way of the next.
    for number in range(CALIBRATIONS):
        with Idler() as idler:
            echoes, pictures = type_throughout(terminal, shared, random.Random(number))
        assert pictures > 3, "the heatmap stood still"
        fair = sorted(gap for gap, end in echoes if not idler.stalled(end - gap, end))
        every = sorted(gap for gap, _ in echoes)
        with capsys.disabled():
            print(f"\nkeys during a calibration: {figures(every)}; {len(every) - len(fair)} of them "
                  f"while an idle program stood still, the others: {figures(fair)}; load "
                  f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")  # fmt: skip
        assert len(every) > 100
        assert state(terminal) == before
        require_prompt(fair, len(every))


def require_prompt(fair: list[float], keys: int) -> None:
    """Each echo came at once; skip where the machine was too busy to tell."""
    load, enough = os.getloadavg()[0], len(fair) > 0.8 * keys
    if enough and fair[-1] <= MOST_GAP:
        return
    if not enough or load > 1.5 * (os.cpu_count() or 1):
        pytest.skip(f"the machine is too busy to tell (load {load:.1f}): run this alone")
    raise AssertionError(f"an echo took {1000 * fair[-1]:.0f} ms")


def figures(gaps: list[float]) -> str:
    """Percentiles of ascending seconds."""
    if not gaps:
        return "none"
    p50, p95, most = (1000 * gaps[int(q * (len(gaps) - 1))] for q in (0.5, 0.95, 1.0))
    return f"{len(gaps)} keys, p50 {p50:.1f} ms, p95 {p95:.1f} ms, most {most:.1f} ms"


class Idler:
    """Another program that only wakes up now and then: when it stands still, the machine does."""

    CODE = (
        "import sys, time\n"
        "last = time.monotonic()\n"
        "while True:\n"
        "    time.sleep(0.005); sum(range(20000)); now = time.monotonic()\n"
        "    if now - last > 0.03: print(last, now, flush=True)\n"
        "    last = now\n"
    )

    def __enter__(self) -> Idler:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        out, _err = self._process.communicate()
        lines = [line.split() for line in out.splitlines(keepends=True) if line.endswith("\n")]
        self._stalls = [(float(a), float(b)) for a, b in lines]

    def stalled(self, begin: float, end: float) -> bool:
        """Whether it stood still at any time between two moments."""
        return any(a < end and begin < b for a, b in self._stalls)


def type_throughout(
    terminal: Terminal, shared: Shared, pause: random.Random
) -> tuple[list[tuple[float, float]], int]:
    """(seconds to the echo, when it came) of each key, and how many pictures the heatmap showed."""
    enter(terminal, f"collect --dataset {shared.mixed} --max-samples 96 --max-tokens 256")
    terminal.wait_for("▶ collect", 10)
    terminal.type(":")
    time.sleep(0.3)
    echoes: list[tuple[float, float]] = []
    pictures = set()
    while "▶ collect" in terminal.text():
        if len(echoes) % len(LETTERS) == 0:
            clear(terminal)
        gap = terminal.echo(LETTERS[len(echoes) % len(LETTERS)])
        echoes.append((gap, time.monotonic()))
        pictures.add(terminal.text().partition("2 chat")[0])
        time.sleep(pause.uniform(0.005, 0.05))
    return echoes, len(pictures)


def test_a_job_cancelled_half_way_leaves_the_state(terminal: Terminal, shared: Shared) -> None:
    loaded = state(terminal)
    collect = f"collect --dataset {shared.mixed} --max-samples 64 --max-tokens 128"
    enter(terminal, collect)
    terminal.wait_for("▶ collect", 10)
    terminal.wait_for(r"[1-9]\d* of 64|[1-9]\d* samples", 120)
    terminal.type(CTRL_C)
    terminal.wait_for(r"cancelled after \d+ of 64")
    idle(terminal)
    assert state(terminal) == loaded
    run(terminal, "prune --n-prune 8", "staged prune")
    run(terminal, "apply", "node 1")
    applied = state(terminal)
    assert applied != loaded
    cancelled = 0
    for attempt in range(12):
        enter(terminal, "compact")
        time.sleep(0.01 * attempt)
        terminal.type(CTRL_C)
        idle(terminal)
        time.sleep(0.5)
        assert state(terminal) == applied
        if was_cancelled(terminal):
            cancelled += 1
            break
        run(terminal, "undo", "undo: compact")
    assert cancelled, "compact was too quick to be cancelled in any attempt"
    run(terminal, "smoke-test", "smoke test passed")
    run(terminal, "undo", "undo: prune")
    assert state(terminal) == loaded


def was_cancelled(terminal: Terminal) -> bool:
    """Whether the last message says that compact was cancelled."""
    return "cancelled" in terminal.text().splitlines()[-4]


def test_a_save_cancelled_half_way_leaves_no_directory(terminal: Terminal, tmp_path: Path) -> None:
    before = state(terminal)
    enter(terminal, "save out")
    terminal.wait_for("▶ save", 10)
    terminal.type(CTRL_C)
    idle(terminal)
    assert state(terminal) == before
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_it_leaves_at_once_in_the_middle_of_a_calibration(
    terminal: Terminal, shared: Shared
) -> None:
    state(terminal)
    enter(terminal, f"collect --dataset {shared.mixed}")
    terminal.wait_for("▶ collect", 10)
    time.sleep(1.0)
    began = time.monotonic()
    terminal.type(CTRL_Q)
    assert terminal.end() == 0
    assert time.monotonic() - began < 3.0
    assert "Traceback" not in terminal.text()


def test_the_first_paint_comes_before_the_model(terminal: Terminal) -> None:
    while terminal.painted is None:
        assert terminal.process.poll() is None
        time.sleep(0.005)
    assert re.search(STATE, terminal.text()) is None
    state(terminal)
    assert terminal.painted - terminal.began < 2.0
