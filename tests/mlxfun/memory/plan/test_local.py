"""`load` alone: what is on this machine, from headers, whatever state the cache is in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlxfun.data import demo
from mlxfun.errors import MlxfunError
from mlxfun.memory.plan import local
from mlxfun.memory.plan.local import local_models, note_recent, read_recent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model, one whose download was broken off, and a data set."""
    root = tmp_path / "hub"
    scan = local.huggingface_hub.scan_cache_dir
    monkeypatch.setattr(local.huggingface_hub, "scan_cache_dir", lambda: scan(root))
    every = sorted(file.name for file in demo.model_path().iterdir())
    for folder, files in (
        ("models--owner--whole", every),
        ("models--owner--broken-off", ["config.json"]),
        ("datasets--owner--texts", every),
    ):
        snapshot = root / folder / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (root / folder / "blobs").mkdir()
        (root / folder / "refs").mkdir()
        (root / folder / "refs" / "main").write_text("abc")
        for name in files:
            blob = root / folder / "blobs" / name
            shutil.copy(demo.model_path() / name, blob)
            (snapshot / name).symlink_to(blob)
    return root


def test_models_of_the_cache_and_recent_ones_are_listed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(demo.model_path(), mine)
    report = local_models((str(mine), "/gone", "owner/whole"))
    assert cache.is_dir()
    assert [(m.source, m.origin, m.fit) for m in report.models] == [
        ("demo", "included", "whole"),
        (str(mine), "recent", "whole"),
        ("owner/whole", "recent", "whole"),
    ]
    assert {m.bytes for m in report.models} == {report.models[0].bytes}
    assert "3 models on this machine, 3 fit whole into memory" in report.summary()
    assert "1 model on this machine, 1 fits whole into memory" in (
        replace(report, models=report.models[:1]).summary()
    )
    monkeypatch.setattr(local, "memory_limit", lambda: report.models[0].bytes - 1)
    assert [m.fit for m in local_models(()).models] == ["partly", "partly"]


def test_a_model_that_cannot_be_read_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    (bad / "model.safetensors").write_bytes(b"x")
    models = {m.source: m for m in local_models((str(bad),)).models}
    assert models[str(bad)].problem
    assert models[str(bad)].fit is None
    assert models["demo"].fit == "whole"


def test_without_a_cache_there_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = local.huggingface_hub.scan_cache_dir
    monkeypatch.setattr(local.huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path / "none"))
    assert [m.source for m in local_models(()).models] == ["demo"]


def test_recent_models_are_kept_the_newest_first(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "recent.json"
    assert read_recent(file) == ()
    for name in ("a", "b", "a", *(str(n) for n in range(30)), "b"):
        note_recent(file, name)
    found = read_recent(file)
    assert found[:2] == ("b", "29")
    assert len(found) == len(set(found)) == 20
    for broken in ("{", json.dumps({"a": 1}), json.dumps([1, "x"])):
        file.write_text(broken)
        assert read_recent(file) in ((), ("x",))
    file.unlink()
    file.mkdir()
    note_recent(file, "a")  # a list that cannot be written is done without
    assert not isinstance(read_recent(file), MlxfunError)
