"""Sessions that were cut short: when one is offered, what is refused, what is forgotten."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.scripts import resume
from commands.workbench.session_file import read_script
from mlxfun.events import Notice
from tests.commands.conftest import Bench

MakeBench = Callable[..., Bench]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sessions"


def crashed(make_bench: MakeBench, folder: Path, *lines: str) -> Path:
    """A session that did `lines` and whose process is gone without a word."""
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("load demo", *lines)
    journal = bench.engine._bench.journal
    kept = journal.kept
    assert kept is not None
    journal.close()  # as the system does for a process that is killed
    for beside in kept.parent.glob(f"{kept.stem}.*.npz"):
        beside.rename(beside.with_name(beside.name.replace(kept.stem, "gone", 1)))
    return kept.rename(kept.with_stem("gone"))


def notices(bench: Bench) -> list[str]:
    return [e.text for e in bench.events if isinstance(e, Notice)]


def test_a_session_that_runs_is_nobody_elses_to_resume(make_bench: MakeBench, folder: Path) -> None:
    running = make_bench()
    running.engine.keep(folder)
    running.do("load demo", "collect --dataset demo:mixed --max-samples 2")
    assert resume.cut_short(folder) == []
    running.engine.forget()
    assert list(folder.iterdir()) == []


def test_the_next_load_tells_of_it_once(make_bench: MakeBench, folder: Path) -> None:
    crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2", "prune --n-prune 2")
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("load demo", "load demo --drop")
    told = [text for text in notices(bench) if "was cut short" in text]
    assert len(told) == 1
    assert "on demo was cut short after 2 commands" in told[0]


def test_it_is_brought_back_and_kept_on_in_the_new_session(
    make_bench: MakeBench, folder: Path
) -> None:
    path = crashed(
        make_bench, folder, "collect --dataset demo:mixed --max-samples 2", "prune --n-prune 2",
        "apply", "stats save s.npz",
    )  # fmt: skip
    bench = make_bench()
    bench.engine.keep(folder)
    (ended,) = bench.do("resume")
    assert ended.report is not None
    assert ended.report.data() == {
        "commands": 3, "passed": 1, "cut": None, "skipped": ["stats save"]
    }  # fmt: skip
    assert not path.exists()
    kept = bench.engine._bench.journal.kept
    assert kept is not None
    assert "\napply\n" in kept.read_text()


def test_a_line_that_was_running_is_named_and_not_run(make_bench: MakeBench, folder: Path) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    with path.open("a") as file:
        file.write("prune --n-prune 2\n")
    bench = make_bench()
    bench.engine.keep(folder)
    (ended,) = bench.do("resume")
    assert ended.report is not None
    assert ended.report.data()["cut"] == "prune --n-prune 2"
    assert bench.engine.view().plan is None


def test_it_is_refused_elsewhere_since_its_paths_would_lead_astray(
    make_bench: MakeBench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    folder.parent.joinpath("elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    bench = make_bench()
    bench.engine.keep(folder)
    error = bench.run("resume").error
    assert error is not None
    assert f"ran in {folder.parent}: start mlxfun-shell there" in error
    assert path.exists()


def test_drop_forgets_it(make_bench: MakeBench, folder: Path) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("resume --drop")
    assert not path.exists()
    assert [p.name for p in folder.iterdir()] == [bench.engine._bench.journal.kept.name]
    error = bench.run("resume").error
    assert error is not None
    assert "no session was cut short" in error


def test_a_session_without_a_command_is_not_worth_a_word(
    make_bench: MakeBench, folder: Path
) -> None:
    path = crashed(make_bench, folder)
    assert resume.cut_short(folder) == []
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["{here}/mine.txt", "{here}/mine.mlxfun", "../mine.txt", "'*'", "'*.mlxfun'", "{here}/sessions/../mine.mlxfun",
             "gone.npz", "''", "nothing"]
)  # fmt: skip
def test_drop_removes_kept_sessions_only(make_bench: MakeBench, folder: Path, name: str) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    Path("mine.txt").write_text("mine")
    Path("mine.mlxfun").write_text("#!mlxfun-session 2\nundo\n")
    bench = make_bench()
    bench.engine.keep(folder)
    before = sorted(folder.parent.rglob("*"))
    error = bench.run(f"resume --drop {name.format(here=folder.parent)}").error
    assert error is not None
    assert "path is empty" in error or "no kept session is called" in error
    assert sorted(folder.parent.rglob("*")) == before
    bench.do("resume --drop gone")
    assert not path.exists()
    assert Path("mine.txt").exists()


def test_drop_leaves_the_session_of_another_shell_alone(
    make_bench: MakeBench, folder: Path
) -> None:
    running = make_bench()
    running.engine.keep(folder)
    running.do("load demo", "collect --dataset demo:mixed --max-samples 2")
    (path,) = folder.glob("*.mlxfun")
    bench = make_bench()
    bench.engine._bench.sessions = folder
    assert "no kept session is called" in (bench.run(f"resume --drop {path.stem}").error or "")
    assert path.exists()


def test_a_name_with_wildcards_takes_nothing_else_with_it(tmp_path: Path) -> None:
    for name in ("*.mlxfun", "a.mlxfun", "a.1.npz", "*.1.npz"):
        (tmp_path / name).touch()
    resume.drop(tmp_path / "*.mlxfun")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.1.npz", "a.mlxfun"]


@pytest.mark.parametrize(
    "content", [b"#!mlxfun-session 9\nundo\n", b"#!mlxfun-session 2\n#: directory \xff\nundo\n"]
)
def test_a_session_that_cannot_be_read_is_neither_offered_nor_removed(
    make_bench: MakeBench, folder: Path, content: bytes
) -> None:
    folder.mkdir()
    (folder / "newer.mlxfun").write_bytes(content)
    assert resume.cut_short(folder) == []
    assert (folder / "newer.mlxfun").read_bytes() == content
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("resume --drop newer")
    assert not (folder / "newer.mlxfun").exists()


@pytest.mark.parametrize("line", ["resume", "resume --drop", "resume --drop 'x.mlxfun'"])
def test_resume_is_no_command_of_a_session_file(
    make_bench: MakeBench, folder: Path, line: str
) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    Path("s.mlxfun").write_text(f"{line}\n")
    Path("s.recipe").write_text(f"{line}\nat most 9 MB\ntry prune --n-prune 4\n")
    bench = make_bench()
    bench.engine.keep(folder)
    assert bench.run("replay s.mlxfun").error == (
        "s.mlxfun:1: resume cannot be part of a session file"
    )
    assert bench.run("recipe s.recipe").error == "s.recipe:1: resume cannot be part of a recipe"
    assert path.exists()


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"a\nundo\n#: model x", b"trailing ", b" ", b'"quoted', "ä\u2028b".encode()],
)
def test_a_session_in_a_directory_of_any_name_is_resumed_there(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    here = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    folder = tmp_path / "sessions"
    crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2", "prune --n-prune 2")
    (path,) = resume.cut_short(folder)
    assert [e.line for e in read_script(path).entries][-1] == "prune --n-prune 2"
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("resume")
    assert bench.engine.view().plan is not None


def test_a_model_path_puts_no_line_into_a_recording(make_bench: MakeBench, folder: Path) -> None:
    bench = make_bench()
    bench.engine.record(folder.with_name("s.mlxfun"))
    Path("a\nundo\n#: seed 7").mkdir()
    bench.do("load './a\nundo\n#: seed 7' --revision 'b\nc'", "info")
    script = read_script(folder.with_name("s.mlxfun"))
    assert [e.line for e in script.entries] == ["info"]
    assert script.header["model"] == "./a\nundo\n#: seed 7"
    assert script.header["revision"] == "b\nc"
    assert script.seed == 0
    make_bench().do("replay s.mlxfun")
