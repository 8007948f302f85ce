"""What the screen costs over time: memory over an hour of frames, and from key to paint.

Run with `pytest -n 0 -m bench -s tests/bench/test_screen_cost.py`, alone on the machine.
"""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from mlxfun.data import demo
from mlxfun.events import Progress, RoutingFrame
from tests.fake_engine import FakeEngine
from tests.terminal import Terminal
from tests.tui.driving import make

pytestmark = pytest.mark.bench

FRAMES = 12 * 3600  # an hour at the usual rate
SAMPLES = 6
LETTERS = "".join(map(chr, range(0x430, 0x450)))
MOST_P95 = 0.050


def resident_bytes() -> int:
    """What this process holds in memory now (Linux), after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat_over_an_hour_of_frames() -> None:
    """An hour's frames, heat and progress, as fast as they can be drawn."""
    engine = FakeEngine()
    sizes: list[int] = []

    async def body() -> None:
        app = make(engine)
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause()
            engine.finish()
            job = engine.run("collect --dataset demo:mixed")
            engine.step()
            await pilot.pause()
            heats = [np.random.default_rng(i).gamma(1.0, size=(6, 16)) for i in range(8)]
            for frame in range(FRAMES):
                heat = heats[frame % 8]
                engine._emit(RoutingFrame(job, heat * 10, heat, frame, frame * 50))
                engine._emit(Progress(job, "calibrating", frame, FRAMES, "samples", 12.0))
                app.pump()
                if frame % 50 == 0:
                    await pilot._wait_for_screen()
                if frame % (FRAMES // SAMPLES) == FRAMES // SAMPLES - 1:
                    sizes.append(resident_bytes())

    asyncio.run(body())
    print("resident MiB over the hour:", [round(size / 2**20, 1) for size in sizes])
    assert sizes[-1] - sizes[0] < 8 << 20, "memory grows with the frames"


def test_a_key_is_painted_at_once_while_the_worker_is_saturated(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_bytes(demo.dataset_path("mixed").read_bytes() * 40)
    terminal = Terminal.shell("--demo", home=tmp_path)
    try:
        terminal.wait_for(r"state [0-9a-f]{8}")
        terminal.type(":collect --dataset long.jsonl\r")
        terminal.wait_for("samples/s")
        terminal.type(":")
        gaps: list[float] = []
        for round_ in range(6):
            gaps += [terminal.echo(letter) for letter in LETTERS]
            terminal.type("\x15")
            while LETTERS[0] in terminal.text():
                pass
            assert "▶ collect" in terminal.text(), f"the calibration ended in round {round_}"
    finally:
        terminal.close()
    p50, p95, most = (1000 * sorted(gaps)[int(q * (len(gaps) - 1))] for q in (0.5, 0.95, 1))
    load = os.getloadavg()[0]
    print(
        f"key to paint (load {load:.1f}): {len(gaps)} keys, p50 {p50:.1f}, p95 {p95:.1f}, most {most:.1f} ms"
    )
    assert p95 < 1000 * MOST_P95
