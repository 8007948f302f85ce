"""A save whose process was killed is continued by the next one like it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.checkpoint.replacing import atomic
from mlxfun.context import Context
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled
from mlxfun.files import writer
from mlxfun.techniques.prune.options import SelectOptions
from tests.mlxfun import tiny_checkpoints as tiny

SHARD = 60_000
DROP = {0: (0, 3), 1: (0, 3)}

KILLED = """
import os, signal, sys
from pathlib import Path
from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.context import Context
from mlxfun.editing.options import ApplyOptions
from mlxfun.techniques.prune.options import SelectOptions

class Kill(Context):
    def progress(self, label, done, total=None, unit=""):
        if label == "save" and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

session = Session.open(sys.argv[1], LoadOptions(resident="none"))
session.select(SelectOptions(drop={0: (0, 3), 1: (0, 3)}))
session.apply(ApplyOptions())
session.save(SaveOptions(Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3])), Kill())
"""


class Leaves(Context):
    """Half-way through a save, sets aside what a kill would leave, and cancels."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        """See Context."""
        if label == "save" and total is not None and done > total // 2:
            (under_way,) = self._parent.glob(".m.saving-*")
            host = writer().partition("-")[0]
            shutil.copytree(under_way, self._parent / f".m.saving-{host}-{dead()}-00000000")
            raise Cancelled("cancelled")


def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes()
            for f in directory.rglob("*") if f.is_file()}  # fmt: skip


def files(directory: Path) -> dict[tuple[str, int, int], Path]:
    """The files of weights, by what tells one from another of the same name."""
    found = directory.glob("model-*.safetensors")
    return {(f.name, f.stat().st_ino, f.stat().st_mtime_ns): f for f in found}


def edited(path: Path, resident: str = "none") -> Session:
    session = Session.open(path, LoadOptions(resident=resident))  # type: ignore[arg-type]
    session.select(SelectOptions(drop=DROP))
    session.apply(ApplyOptions())
    return session


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model", tiny.QWEN3, shards=2)


def options(path: Path) -> SaveOptions:
    return SaveOptions(path, max_shard_bytes=SHARD)


def test_a_killed_save_is_continued_where_it_was(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), str(target), str(SHARD)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = target.parent.iterdir()
    before = files(left)
    report = edited(model).save(options(target))
    assert "taken over from a save like this" in report.notices[-1]
    assert len(before.keys() & files(target).keys()) >= 2
    assert list(target.parent.iterdir()) == [target]
    edited(model, "all").save(options(tmp_path / "other" / "m"))
    assert contents(target) == contents(tmp_path / "other" / "m")


@pytest.mark.parametrize("what", ["edit", "shards", "source", "file"])
def test_what_another_save_has_left_is_not_taken_over(
    model: Path, tmp_path: Path, what: str
) -> None:
    target, asked = tmp_path / "out" / "m", options(tmp_path / "out" / "m")
    with pytest.raises(Cancelled):
        edited(model).save(asked, Leaves(target.parent))
    (left,) = target.parent.iterdir()
    if what == "source":
        for file in model.glob("model*.safetensors"):
            os.utime(file)
    elif what == "file":
        for file in files(left).values():
            with file.open("r+b") as opened:
                opened.write(b"x")
    elif what == "shards":
        asked = SaveOptions(target, max_shard_bytes=2 * SHARD)
    session = edited(model)
    if what == "edit":
        session.undo()
    report = session.save(asked)
    assert not any("taken over" in notice for notice in report.notices)
    assert list(target.parent.iterdir()) == [target]


def test_a_disk_that_is_full_costs_nothing_of_what_was_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "m"
    with pytest.raises(Cancelled):
        edited(model).save(options(target), Leaves(target.parent))
    session = edited(model)
    (left,) = atomic.abandoned_saves(target)
    finished = sum(file.stat().st_size for file in files(left).values())
    total = session.info().checkpoint_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=total - finished)
    monkeypatch.setattr("mlxfun.checkpoint.save.shutil.disk_usage", lambda _: usage)
    with pytest.raises(BudgetError):
        session.save(options(target))
    assert atomic.abandoned_saves(target) == [left]
    monkeypatch.undo()
    assert "taken over" in session.save(options(target)).notices[-1]


def test_a_save_to_another_place_clears_what_was_left(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    with pytest.raises(Cancelled):
        edited(model).save(options(target), Leaves(target.parent))
    assert len(atomic.abandoned_saves(target)) == 1
    edited(model).save(options(target.with_name("n")))
    assert list(target.parent.iterdir()) == [target.with_name("n")]
