"""A save whose process was killed is continued by the next one like it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.checkpoint.replacing import atomic
from mlxfun.context import SILENT, Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled
from mlxfun.files import writer
from mlxfun.techniques.merge.options import MergeOptions
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
            host, under_way = writer().partition("-")[0], list(self._parent.glob(".m.saving-*"))
            for number, directory in enumerate(under_way):
                left = f".m.saving-{host}-{dead()}-{number:08x}"
                shutil.copytree(directory, self._parent / left)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("what", ["edit", "source", "file"])
def test_what_another_save_has_left_is_not_taken_over(
    model: Path, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "out" / "m"
    with pytest.raises(Cancelled):
        edited(model).save(options(target), Leaves(target.parent))
    (left,) = target.parent.iterdir()
    if what == "source":
        for file in model.glob("model*.safetensors"):
            os.utime(file)
    elif what == "file":
        for file in files(left).values():
            with file.open("r+b") as opened:
                opened.write(b"x")
    session = edited(model)
    if what == "edit":
        session.undo()
    report = session.save(options(target))
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


def test_an_edit_straight_to_disk_goes_on_with_its_files(model: Path, tmp_path: Path) -> None:
    data = DatasetOptions("demo:mixed", max_samples=4, max_tokens=24)
    merge, target = MergeOptions(data, n_prune=4), tmp_path / "out" / "m"
    reports = []
    for ctx in (Leaves(target.parent), SILENT):
        session = Session.open(model, LoadOptions(resident="none"))
        with suppress(Cancelled):
            reports.append(session.write_edit(merge, options(target), ctx))
    assert any("taken over" in notice for notice in reports[0].notices)
    plain = tmp_path / "other" / "m"
    Session.open(model).write_edit(merge, options(plain))
    assert contents(target) == contents(plain)
