"""A disk that is full under the journal: one warning, whole lines, and the session goes on.

A limit on the size of files stands for the full disk: what exceeds it fails as writing does there.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from commands.scripts import resume
from commands.workbench.session_file import read_script
from mlxfun.events import Notice
from tests.commands.conftest import SESSION, Bench

ROOT = Path(__file__).resolve().parents[3]
MakeBench = Callable[..., Bench]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warnings(bench: Bench) -> list[str]:
    return [e.text for e in bench.events if isinstance(e, Notice) and "has stopped" in e.text]


def whole(make_bench: MakeBench, here: Path) -> str:
    """The recording of SESSION with all the room it needs."""
    bench = make_bench()
    bench.engine.record(here / "whole.mlxfun")
    bench.do("load demo", *SESSION[:-1])
    return (here / "whole.mlxfun").read_text()


def test_wherever_it_fills_up_the_recording_holds_what_ran_and_replays(
    make_bench: MakeBench, here: Path
) -> None:
    full = whole(make_bench, here)
    header = full.index("#: model")
    for size in range(header, len(full.encode()), 23):
        bench, path = make_bench(), here / f"{size}.mlxfun"
        bench.engine.record(path)
        with room_for(size):
            bench.do("load demo", *SESSION[:4])
            assert bench.run("apply --nonsense").error is not None
            bench.do(*SESSION[4:-1])
        assert len(warnings(bench)) == 1, size
        assert f"recording to {path} has stopped: File too large" in warnings(bench)[0]
        assert bench.engine.recording is None
        text = path.read_text()
        assert full.startswith(text)
        assert text.endswith("\n")
        if "collect" in text:
            make_bench().do(f"replay {path}")


def test_a_line_that_failed_is_not_in_it(make_bench: MakeBench, here: Path) -> None:
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo", "info")
    with room_for(len((here / "s.mlxfun").read_bytes()) + len("redo\n") + 4):
        assert bench.run("redo").error is not None
        bench.do("info", "layers")
    assert [e.line for e in read_script(here / "s.mlxfun").entries] == ["info"]
    assert len(warnings(bench)) == 1


def test_a_recording_that_cannot_begin_is_refused_and_leaves_no_file(
    make_bench: MakeBench, here: Path
) -> None:
    (here / "old.mlxfun").write_text("#!mlxfun-session 2\ninfo\n")
    before = {p.name: p.read_bytes() for p in here.iterdir()}
    bench = make_bench()
    bench.do("load demo")
    for name in ("new.mlxfun", "old.mlxfun"):
        with room_for(30):
            error = bench.run(f"record {name}").error
        assert error is not None
        assert error.endswith("File too large")
        assert {p.name: p.read_bytes() for p in here.iterdir()} == before


def test_a_kept_session_that_cannot_be_written_ends_as_it_should(
    make_bench: MakeBench, here: Path
) -> None:
    bench, folder = make_bench(), here / "sessions"
    with room_for(30), pytest.raises(OSError, match="File too large"):
        bench.engine.keep(folder)
    assert list(folder.iterdir()) == []
    bench.engine.keep(folder)
    (path,) = folder.iterdir()
    with room_for(path.stat().st_size + 20):
        bench.do("load demo", *SESSION[:-1])
        bench.do("undo")
    assert len(warnings(bench)) == 1
    assert "keeping" in warnings(bench)[0]
    bench.engine.forget()
    assert list(folder.iterdir()) == []
    assert resume.cut_short(folder) == []


def test_a_kept_session_is_resumed_as_far_as_it_was_written(
    make_bench: MakeBench, here: Path
) -> None:
    bench, folder = make_bench(), here / "sessions"
    bench.engine.keep(folder)
    bench.do("load demo", *SESSION[:2])
    (path,) = folder.glob("*.mlxfun")
    with room_for(path.stat().st_size + 3):
        bench.do("apply", "undo")
    bench.engine._bench.journal.close()
    path.rename(folder / "gone.mlxfun")
    for beside in folder.glob("*.npz"):
        beside.rename(folder / f"gone.{beside.name.split('.')[1]}.npz")
    back = make_bench()
    back.engine.keep(folder)
    back.do("resume")
    assert back.engine.view().plan is not None


def test_a_whole_program_goes_on_and_ends_without_a_traceback(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/commands/stub_program.py"), "--plain", "--demo"],
        cwd=here, capture_output=True, text=True, timeout=60, check=False,
        input="record s.mlxfun\n" + "info\n" * 40 + "quit\n",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)),
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here / "state"),
             "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("has stopped: File too large") == 2  # recording and keeping
    assert done.stdout.rstrip().endswith("bye")
    assert {e.line for e in read_script(here / "s.mlxfun").entries} == {"info"}
    assert list((here / "state" / "mlxfun" / "sessions").iterdir()) == []
