"""The files of a resident model are replaced, changed or deleted while it is resident."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from mlxfun.checkpoint.options import SaveOptions
from mlxfun.data import demo
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import ModelError
from mlxfun.session.session import Session
from mlxfun.techniques.prune.options import SelectOptions

WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.model_path(), tmp_path / "model"))


@pytest.fixture
def compacted(model: Path) -> Iterator[Session]:
    """Four experts of each layer are gone from memory: undo has to read them back."""
    session = Session.open(model)
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0, 1, 2, 3))))
    session.apply(ApplyOptions())
    session.compact()
    yield session
    session.close()


def other_weights(model: Path) -> None:
    """What `save --force` of another shell does: new files of the same names and sizes."""
    file = model / WEIGHTS
    arrays, metadata = mx.load(str(file), return_metadata=True)
    aside = model / "new.safetensors"
    mx.save_safetensors(str(aside), {k: v + 1 for k, v in arrays.items()}, metadata)
    os.replace(aside, file)


def one_byte(model: Path) -> None:
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (model / WEIGHTS).write_bytes(data)


def truncated(model: Path) -> None:
    os.truncate(model / WEIGHTS, 1 << 20)


def deleted(model: Path) -> None:
    shutil.rmtree(model)


def another_shard(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "model-x.safetensors")


def parameters(session: Session) -> dict[str, bytes]:
    return {path: bytes(memoryview(a)) for path, a in tree_flatten(session.model.parameters())}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_weights, f"model/{WEIGHTS} was changed"),
        (one_byte, f"model/{WEIGHTS} was changed"),
        (truncated, f"model/{WEIGHTS} was changed"),
        (deleted, r"model/config.json is gone"),
        (another_shard, "model/model-x.safetensors is new"),
    ],
)
def test_nothing_is_read_back_from_other_files(
    compacted: Session, model: Path, change: Callable[[Path], None], said: str
) -> None:
    before, state = parameters(compacted), compacted.state
    history = compacted.editor.history.report()
    change(model)
    with pytest.raises(ModelError, match=f"{said} since the model was loaded from it"):
        compacted.undo()
    assert parameters(compacted) == before
    assert compacted.state == state
    assert compacted.editor.history.report() == history
    compacted.select(SelectOptions(drop=dict.fromkeys(range(6), (4,))))
    compacted.discard()
    assert parameters(compacted) == before


def test_files_put_back_as_they_were_are_read_again(compacted: Session, model: Path) -> None:
    aside = model.with_name("aside")
    model.rename(aside)
    with pytest.raises(ModelError, match="is gone"):
        compacted.undo()
    aside.rename(model)
    compacted.undo()
    compacted.undo()
    fresh = Session.open(model)
    assert parameters(compacted) == parameters(fresh)
    fresh.close()


def test_compact_is_refused_where_it_could_not_be_undone(model: Path) -> None:
    session = Session.open(model)
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0,))))
    session.apply(ApplyOptions())
    before = parameters(session)
    other_weights(model)
    with pytest.raises(ModelError, match="was changed since"):
        session.compact()
    assert parameters(session) == before
    session.close()


@pytest.mark.parametrize("change", [deleted, other_weights])
def test_what_is_in_memory_is_saved_and_what_is_lost_is_named(
    compacted: Session, model: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    prompt = compacted.tokenizer.encode("What is a mortgage?")
    change(model)
    report = compacted.save(SaveOptions(tmp_path / "out"))
    first, second = report.notices
    assert "since the model was loaded from it: weights, configuration and tokenizer" in first
    assert second == "not saved, since they are in no other place: README.md"
    assert report.gate["logits"] == "identical"
    loaded, tokenizer = stock_load(str(tmp_path / "out"))
    assert tokenizer.encode("What is a mortgage?") == prompt
    assert tokenizer.chat_template == compacted.tokenizer.chat_template
    assert loaded.args.num_experts == 12
    assert not (tmp_path / "out" / "README.base.md").exists()


def test_other_files_are_not_verified_as_those_of_the_resident_model(
    compacted: Session, model: Path
) -> None:
    assert compacted.info(verify=True).digest
    other_weights(model)
    with pytest.raises(ModelError, match="was changed since the model was loaded"):
        compacted.info(verify=True)


def test_an_unchanged_directory_goes_along_whole(compacted: Session, tmp_path: Path) -> None:
    report = compacted.save(SaveOptions(tmp_path / "out"))
    assert report.notices == ()
    assert (tmp_path / "out" / "README.base.md").exists()
