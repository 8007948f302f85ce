"""Cancels, kills and full disks: the old model, the new model, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mlxfun.checkpoint import save as save_module
from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing import atomic
from mlxfun.checkpoint.save import write
from mlxfun.errors import Cancelled, SaveError
from mlxfun.files import renaming, writer
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import StopAt, export_of, refused, snapshot

HOST = writer().split("-")[0]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base", tiny.QWEN3, shards=2)


def test_a_cancel_at_any_check_leaves_nothing(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    count = len(export.weights.names)
    # While writing, while comparing tensors, and just before the rename.
    for n in (1, count, count + 1, 2 * count + 1):
        with pytest.raises(Cancelled):
            write(export, SaveOptions(tmp_path / "new" / "out"), StopAt(n))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    write(export, SaveOptions(tmp_path / "new" / "out"), StopAt(2 * count + 2))
    assert (tmp_path / "new" / "out" / "config.json").exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.mlxfun.exports import export_of
    from tests.mlxfun.exports import StopAt
    from mlxfun.checkpoint.replacing import atomic
    from mlxfun.checkpoint.save import write
    from mlxfun.checkpoint.options import SaveOptions

    base, out, point = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    ctx = StopAt(int(point), die) if point.isdigit() else StopAt(-1)
    if point == "moved aside":
        atomic.exchange = lambda *_: False
        atomic._place = die
    elif point == "after the exchange":
        atomic.shutil.rmtree = die
    elif point == "before the exchange":
        atomic.exchange = die
    write(export_of(base), SaveOptions(out, force=True), ctx)
"""


@pytest.mark.parametrize(
    ("point", "survivor"),
    [
        ("1", "old"),
        ("40", "old"),
        ("before the exchange", "old"),
        ("moved aside", "backup"),
        ("after the exchange", "new"),
    ],
)
def test_a_kill_at_any_point_leaves_the_old_or_the_new_model_whole(
    tmp_path: Path, source: Path, point: str, survivor: str
) -> None:
    old = tiny.write(tmp_path / "out", tiny.QWEN3 | {"num_experts": 4})
    before = snapshot(old)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(old), point],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    left = atomic.recoverable(tmp_path)
    if survivor == "backup":
        (backup,) = left
        assert not old.exists()
        assert atomic.recover(backup) == old
    else:
        assert left == []
    atomic.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    if survivor == "new":
        assert load(old).config["num_experts"] == 8
    else:
        assert snapshot(old) == before
    write(export_of(source), SaveOptions(old, force=True))


def test_a_save_cleans_up_after_a_killed_one(tmp_path: Path, source: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = tmp_path / f".out.saving-{HOST}-{dead.pid}-0123abcd"
    running = tmp_path / f".out.saving-{HOST}-{os.getpid()}-0123abcd"
    elsewhere = tmp_path / f".out.saving-00000000-{dead.pid}-0123abcd"
    for path in (stale, running, elsewhere):
        path.mkdir()
    write(export_of(source), SaveOptions(tmp_path / "out"))
    assert not stale.exists()
    assert running.exists()
    assert elsewhere.exists()


def test_where_directories_cannot_be_exchanged_the_old_one_is_moved_aside(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_of(source)
    write(export, SaveOptions(tmp_path / "out"))
    (tmp_path / "out" / "stale.safetensors").write_text("old")
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    write(export, SaveOptions(tmp_path / "out", force=True))
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_appears_in_the_target_during_a_save_is_not_deleted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Before the commit with --force, and in a new place or an empty directory without it."""
    if not exchanges:
        monkeypatch.setattr(renaming, "_call", lambda *_: False)
    export = export_of(source)
    out = tmp_path / "out"
    real = save_module.check

    def meanwhile(*arguments: Any) -> Any:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years of work")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(save_module, "check", meanwhile)
        for prepare in (lambda: None, out.mkdir):
            prepare()
            with pytest.raises(SaveError, match="appeared while this was being saved"):
                write(export, SaveOptions(out))
            assert snapshot(out) == {"thesis.txt": b"years of work"}
            shutil.rmtree(out)
        tiny.write(out, tiny.QWEN3 | {"num_experts": 4})
        before = snapshot(out)
        with pytest.raises(SaveError, match=r"changed by something else .*\(thesis.txt\)"):
            write(export, SaveOptions(out, force=True))
        assert snapshot(out) == before | {"thesis.txt": b"years of work"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_written_into_the_target_at_the_moment_of_the_exchange_comes_back(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    export, out = export_of(source), tiny.write(tmp_path / "out", tiny.QWEN3 | {"num_experts": 4})
    before = snapshot(out)
    real, calls = atomic._require_same, []

    def late(directory: Path, *rest: Any) -> None:
        calls.append(directory)
        if len(calls) == 2:  # the first look, right before, has found nothing
            (directory / "thesis.txt").write_text("years of work")
        real(directory, *rest)

    monkeypatch.setattr(atomic, "_require_same", late)
    if not exchanges:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    with pytest.raises(SaveError, match=r"changed by something else .*\(thesis.txt\)"):
        write(export, SaveOptions(out, force=True))
    assert snapshot(out) == before | {"thesis.txt": b"years of work"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_the_old_model_is_kept_when_its_place_is_taken_while_it_is_aside(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, out = export_of(source), tiny.write(tmp_path / "out", tiny.QWEN3 | {"num_experts": 4})
    before = snapshot(out)
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    real = atomic._place

    def taken(temporary: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").write_text("x")
        real(temporary, target)

    monkeypatch.setattr(atomic, "_place", taken)
    with pytest.raises(SaveError, match=r"what was there before is now .*out\.before-save"):
        write(export, SaveOptions(out, force=True))
    assert snapshot(out) == {"theirs": b"x"}
    atomic.sweep(tmp_path)
    (kept,) = tmp_path.glob("out.before-save-*")
    assert snapshot(kept) == before


def test_this_system_exchanges_directories_in_one_call(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "a").write_text("")
    assert atomic.exchange(first, second)
    assert (second / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        atomic.exchange(first, tmp_path / "missing")


def test_a_backup_is_not_recovered_over_something_else(tmp_path: Path) -> None:
    backup = tmp_path / f"out{atomic.BACKUP}"
    backup.mkdir()
    assert atomic.recoverable(tmp_path) == [backup]
    (tmp_path / "out").mkdir()
    assert atomic.recoverable(tmp_path) == []
    with pytest.raises(SaveError, match=r"cannot be recovered: .*out exists"):
        atomic.recover(backup)


def test_a_failed_write_is_a_save_error_and_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    export = export_of(source)
    monkeypatch.setattr(save_module.shutil, "copyfile", full)
    refused(tmp_path, export, "could not be written: .*No space left on device")
