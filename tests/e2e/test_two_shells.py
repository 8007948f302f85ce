"""Two shells work on one directory: neither loses or corrupts anything of the other's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun.checkpoint.identity import checkpoint_id
from mlxfun.data import demo
from tests.e2e.conftest import Program, Shell, typed


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.model_path(), tmp_path / "model")
    return tmp_path


@pytest.fixture
def first(here: Path) -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.engine.close()


def test_a_model_saved_over_by_another_shell_is_not_mixed_into_this_one(
    first: Shell, here: Path, program: Program
) -> None:
    first.do("load model", "select --drop 0:0,1:0,2:0,3:0,4:0,5:0", "apply", "compact")
    state = first.engine.view().state
    other = program.run(
        "--headless", "--demo",
        *typed(["steer --rule additive --activate 3:7", "bake --dataset demo:mixed", "apply", "save model --force"]),
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    theirs = checkpoint_id(here / "model")
    error = first.refused("undo")
    assert "was changed since the model was loaded from it" in error
    assert first.engine.view().state == state
    first.do("chat --max-tokens 4 hello")
    saved = first.do("save out").report
    assert saved is not None
    assert "saved as they are in memory" in saved.notices[0]  # type: ignore[attr-defined]
    first.do("load out", "smoke-test")
    assert checkpoint_id(here / "model") == theirs


def test_saves_of_two_shells_to_one_new_path_do_not_replace_each_other(
    first: Shell, here: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one publishes while this one is between its look at the path and its rename."""
    from mlxfun.checkpoint import save

    first.do("load model")
    real = save.check

    def meanwhile(*arguments: object) -> object:
        other = program.run(
            "--headless",
            "--demo",
            *typed(["select --drop 0:0,1:0,2:0,3:0,4:0,5:0", "apply", "save out"]),
        )
        assert other.returncode == 0, other.stderr
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(save, "check", meanwhile)
    error = first.refused("save out")
    assert "appeared while this was being saved" in error
    monkeypatch.undo()
    os.chdir(here)
    assert [p.name for p in here.iterdir() if p.name.startswith(".")] == []
    first.do("load out")
    model = first.engine.view().model
    assert model is not None
    assert model.experts == 15
