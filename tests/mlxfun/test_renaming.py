"""Renaming onto nothing and exchanging: the calls as they are made, and what is done without them."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxfun.files import renaming


class FakeCall:
    """A function of libc. answer: 0, or the number of an error."""

    def __init__(self, answer: int) -> None:
        self.answer, self.arguments = answer, ()

    def __call__(self, *arguments: Any) -> int:
        self.arguments = arguments
        ctypes.set_errno(self.answer)
        return -1 if self.answer else 0


def system(monkeypatch: pytest.MonkeyPatch, platform: str, function: str, answer: int) -> FakeCall:
    """A system on which libc has `function` and nothing else."""
    call = FakeCall(answer)
    libc = type("Libc", (), {function: call})()
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: libc)
    return call


def values(call: FakeCall) -> list[tuple[type, Any]]:
    return [(type(argument), argument.value) for argument in call.arguments]


A, B = Path("/a é"), Path("/b")
PATHS = [(ctypes.c_char_p, os.fsencode(A)), (ctypes.c_char_p, b"/b")]
HERE = (ctypes.c_int, -100)


def test_macos_is_asked_by_renamex_np_of_from_to_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """int renamex_np(const char *from, const char *to, unsigned int flags); RENAME_SWAP is 2 and
    RENAME_EXCL 4 in <sys/stdio.h>."""
    call = system(monkeypatch, "darwin", "renamex_np", 0)
    assert renaming.exchange(A, B)
    assert values(call) == [*PATHS, (ctypes.c_uint, 2)]
    renaming.onto_nothing(A, B)
    assert values(call) == [*PATHS, (ctypes.c_uint, 4)]


def test_linux_is_asked_by_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    call = system(monkeypatch, "linux", "renameat2", 0)
    assert renaming.exchange(A, B)
    assert values(call) == [HERE, PATHS[0], HERE, PATHS[1], (ctypes.c_uint, 2)]
    renaming.onto_nothing(A, B)
    assert values(call) == [HERE, PATHS[0], HERE, PATHS[1], (ctypes.c_uint, 1)]


SYSTEMS = [("darwin", "renamex_np"), ("linux", "renameat2")]
WITHOUT = [
    *[(*name, code) for name in SYSTEMS for code in (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)],
    ("linux", "nothing", 0), ("darwin", "nothing", 0), ("freebsd14", "rename", 0),
]  # fmt: skip


@pytest.mark.parametrize(("platform", "function", "answer"), WITHOUT)
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_system_that_cannot_still_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, function: str, answer: int,
    links: bool, kind: str,
) -> None:  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        if kind == "directory":
            path.mkdir()
            path = path / "inside"
        path.write_text(path.parent.name + path.name)
    before = second / "inside" if kind == "directory" else second
    text = before.read_text()
    system(monkeypatch, platform, function, answer)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    assert not renaming.exchange(first, second)
    with pytest.raises(OSError, match=r"exists|not empty"):
        renaming.onto_nothing(first, second)
    assert before.read_text() == text
    assert first.exists()
    third = tmp_path / "third"
    renaming.onto_nothing(first, third)
    assert third.exists()
    assert not first.exists()


def refused(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("name", SYSTEMS)
def test_any_other_failure_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: tuple[str, str]
) -> None:
    system(monkeypatch, *name, errno.EEXIST)
    with pytest.raises(FileExistsError) as caught:
        renaming.onto_nothing(A, B)
    assert caught.value.filename == "/b"
    system(monkeypatch, *name, errno.EACCES)
    with pytest.raises(PermissionError):
        renaming.exchange(A, B)


def test_this_system_renames_onto_nothing_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("1")
    second.write_text("2")
    with pytest.raises(FileExistsError):
        renaming.onto_nothing(first, second)
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert renaming.exchange(first, second)
    assert (first.read_text(), second.read_text()) == ("2", "1")
