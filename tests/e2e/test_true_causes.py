"""A save that is refused for NaN says what is known: an edit's doing, or that nothing can tell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxfun.data import demo
from tests.e2e.conftest import Shell

PARAMETER = "model.layers.2.mlp.switch_mlp.down_proj.weight"


@pytest.fixture
def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """The model in the directory `model`, resident, with NaN in it by now."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.model_path(), "model")
    shell = Shell()
    shell.do("load model")
    session: Any = shell.engine._bench.session
    found = session.editor.resident.tree.get(PARAMETER) * float("nan")
    mx.eval(found)  # here: what is lazy belongs to the thread that made it
    session.editor.resident.tree.put(PARAMETER, found)
    yield shell
    shell.engine.close()


def gone() -> None:
    shutil.rmtree("model")


def replaced() -> None:
    file = Path("model/model-00001-of-00001.safetensors")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("happens", "cause"),
    [(gone, "model/config.json is gone since"), (replaced, "safetensors was changed since")],
)
def test_without_the_checkpoint_no_edit_is_blamed(spoiled: Shell, happens: Any, cause: str) -> None:
    happens()
    refusal = spoiled.refused("save out")
    assert f"{PARAMETER} holds NaN or infinity, and" in refusal
    assert cause in refusal
    assert "cannot be told; put the checkpoint back as it was, or undo the edits" in refusal
    assert "which the checkpoint's does not" not in refusal
    assert not Path("out").exists()


def test_with_it_the_edit_is(spoiled: Shell) -> None:
    refusal = spoiled.refused("save out")
    assert f"{PARAMETER} holds NaN or infinity, which the checkpoint's does not" in refusal
