"""A model made from another by few changed tensors is another model, and known as such."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun.checkpoint.identity import earlier_id
from tests.e2e.conftest import COLLECT, Program, Shell

OLD = "248aa7811d9b0fae8175677fe6046da4"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """In a directory with `base`, a model, and `baked`, which differs from it in one router alone.
    The latter is resident; statistics and a recording were made on the former."""
    directory = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        shell = Shell()
        shell.do("load demo", "save base", "record s.mlxfun", "load base", COLLECT)
        shell.do("stats save base.npz", "steer --rule additive --activate 3:7", "bake", "apply")
        shell.do("save baked", "record --stop", "load baked")
        base, baked = (directory / name for name in ("base", "baked"))
        assert earlier_id(base) == earlier_id(baked), "what earlier versions took them for"
        yield shell
        shell.engine.close()


def test_statistics_of_a_model_are_not_taken_on_one_with_a_baked_router(models: Shell) -> None:
    assert "base.npz was made on base, not on baked" in models.refused("stats load base.npz")


def test_nor_is_a_recording_replayed_on_it(models: Shell) -> None:
    assert "the resident model is baked" in models.refused("replay s.mlxfun")


def test_a_session_kept_by_an_earlier_version_is_resumed(program: Program, tmp_path: Path) -> None:
    """Its states are named over the checkpoint's earlier identity."""
    folder = tmp_path.with_name(tmp_path.name + "-elsewhere") / "mlxfun" / "sessions"
    folder.mkdir(parents=True)
    recorded = (Path(__file__).with_name("recorded_format_1.mlxfun")).read_text()
    kept = recorded.split("steer --activate")[0].replace("session 1", "session 2")
    assert f"checkpoint {OLD}" in kept
    (folder / "20260101-000000-1.mlxfun").write_text(f"{kept}#: directory {tmp_path}\n")
    done = program.run("--headless", "--json", "--resume")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["data"]["commands"] == 4
    assert re.search("identity of an earlier version", done.stderr)
    assert report["state"] != "25c4feeba5c9", "the session itself has the names of today"
