"""Small files appear whole or not at all, and nobody's file goes for them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlxfun import files
from mlxfun.errors import SaveError
from mlxfun.files import (
    Kind,
    json_with,
    read_file,
    read_text,
    require_writable,
    write_json,
    write_text,
    writer,
    writing,
)

LIST = Kind("list", json_with("keep_map"))


def test_a_file_and_the_directories_on_the_way_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "x.txt", "grüße\n")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "grüße\n".encode()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.txt"]


def test_a_new_file_has_ordinary_permissions_and_a_replaced_one_keeps_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "new", "1")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_text(tmp_path / "new", "2")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert (tmp_path / "new").read_text() == "2"


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    for place in (path, tmp_path / "deep" / "er" / "y.json"):
        with pytest.raises(TypeError), writing(place) as file:
            file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    path.write_text('{"keep_map": {}}')
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaveError, match=r"^cannot write .*x\.json: No space left on device$"):
        write_json(path, {"keep_map": {"0": [1]}}, LIST)
    assert path.read_text() == '{"keep_map": {}}'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_link_stays_a_link_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.txt").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/real.txt")
    (tmp_path / "dangling").symlink_to("elsewhere/new.txt")
    write_text(tmp_path / "link", "new")
    write_text(tmp_path / "dangling", "made")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "real.txt").read_text() == "new"
    assert (tmp_path / "elsewhere" / "new.txt").read_text() == "made"


def test_places_that_cannot_be_written_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for name, reason in (
        ("dir", "is a directory; name a file in it"),
        ("file/x.npz", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("pipe", "is not an ordinary file; choose another name"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(SaveError, match=reason):
            write_text(tmp_path / name, "x")
    with pytest.raises(SaveError, match=r"^cannot write /proc/x\.npz: "):
        write_text(Path("/proc/x.npz"), "x")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_name_as_long_as_they_may_be_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "x")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize(
    "content", ['{"name": "my-package"}', "[]", "prose", '{"keep_map": {', "1" * 5000, "[" * 9999]
)
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    for attempt in (
        lambda: write_json(path, {"keep_map": {}}, LIST),
        lambda: require_writable(path, LIST),
    ):
        with pytest.raises(SaveError, match=r"x\.json exists and is no list; choose another name"):
            attempt()
    assert path.read_text() == content


def test_a_file_of_the_same_kind_and_an_empty_one_are_replaced(tmp_path: Path) -> None:
    for content in ("", '{"keep_map": {}, "version": "0"}'):
        (tmp_path / "x.json").write_text(content)
        require_writable(tmp_path / "x.json", LIST)
        write_json(tmp_path / "x.json", {"keep_map": {"0": [1]}}, LIST)
        assert json.loads((tmp_path / "x.json").read_text()) == {"keep_map": {"0": [1]}}


def test_asking_writes_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "x.json", LIST)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="it would hold NaN or infinity"):
        write_json(tmp_path / "x.json", {"scale": float("inf")})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mlxfun.files import writing

with writing(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_write_left_is_swept_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text(target, "old")
    root = Path(__file__).resolve().parents[2]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(target)],
            cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        # The second has swept what the first left, and left its own.
        assert len(list(tmp_path.glob(".mlxfun-*"))) == 1
    assert target.read_text() == "old"
    write_text(tmp_path / "b.json", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_only_what_is_known_to_be_abandoned_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = writer().split("-")[0]
    stay = [
        f".mlxfun-{host}-{os.getpid()}-01234567.partial",
        f".mlxfun-00000000-{dead.pid}-01234567.partial",
        f".mlxfun-{host}-{dead.pid}-01234567.partial.mine",
        ".mlxfun-notes.partial",
        ".mlxfun-0123456789abcdef.partial",
    ]
    gone = [f".mlxfun-{host}-{dead.pid}-01234567.partial", ".mlxfun-fedcba9876543210.partial"]
    for name in (*stay, *gone):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / gone[1], (0, 0))
    (tmp_path / f".mlxfun-{host}-{dead.pid}-76543210.partial").symlink_to(tmp_path / stay[3])
    write_text(tmp_path / "a", "x")
    left = {p.name for p in tmp_path.iterdir()}
    assert left >= set(stay)
    assert not left & set(gone)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes into would wait for ever; /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), Path("/dev/tty")):
        if path.exists():
            with pytest.raises(OSError, match=r"pipe or a device|No such device"):
                read_file(path)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(OSError, match="more than 256 MiB"):
        read_file(path)
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 0 MiB"):
        read_file(path, 4)
    path.write_bytes(b"a\r\nb\rc\n")
    assert read_text(path) == "a\nb\nc\n"


def test_a_file_that_says_it_is_empty_and_does_not_end_is_given_up(tmp_path: Path) -> None:
    endless = Path("/proc/self/mem")
    if endless.exists():
        with pytest.raises(OSError):  # noqa: PT011
            read_file(endless, 1 << 20)
