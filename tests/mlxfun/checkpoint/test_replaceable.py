"""What `save --force` may replace: a checkpoint, and nothing that a checkpoint has not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing import atomic
from mlxfun.checkpoint.save import write
from mlxfun.errors import SaveError
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import export_of, snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base", tiny.QWEN3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A model that is about to be replaced."""
    return tiny.write(tmp_path / "out", tiny.QWEN3, shards=2)


def fill(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}")


CHECKPOINT_FILES = (
    # What model directories on the Hub hold.
    "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", ".gitattributes",
    ".gitignore", ".DS_Store", "generation_config.json", "preprocessor_config.json", "merges.txt",
    "vocab.txt", "vocab.json", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja", "model.safetensors.index.json",
    "pytorch_model.bin", "model-q4.gguf", "modeling_qwen3.py", "configuration_qwen3.py",
    "tokenization_qwen3.py", "reap_metadata.json", "README.base.md", "cover.png",
    "assets/benchmark.jpg", "figures/loss.svg", "original/params.json",
    "original/consolidated.00.pth", ".cache/huggingface/download/config.json.metadata",
    "__pycache__/modeling_qwen3.cpython-311.pyc", "Tech_Report.pdf", "SYSTEM_PROMPT.txt",
)  # fmt: skip


def test_a_checkpoint_with_all_that_the_hub_puts_beside_one_is_replaced(
    source: Path, out: Path
) -> None:
    fill(out, *CHECKPOINT_FILES)
    write(export_of(source), SaveOptions(out, force=True))
    assert load(out).stored_dtypes == load(source).stored_dtypes
    assert not (out / "model-q4.gguf").exists()


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["src/a.py"], "src"),
        (["a.py"], "a.py"),
        (["thesis.txt"], "thesis.txt"),
        (["data.jsonl"], "data.jsonl"),
        (["assets/src/a.py"], "assets/src"),
        (["stats.npz"], "stats.npz"),
        (["run.mlxfun", "notes.docx"], "notes.docx, run.mlxfun"),
        ([".venv/bin/python"], ".venv"),
        ([".ssh/id_rsa"], ".ssh"),
        (["report.json"], "report.json"),
    ],
)
def test_what_a_checkpoint_does_not_have_is_named_and_nothing_is_lost(
    source: Path, out: Path, names: list[str], named: str
) -> None:
    fill(out, *names)
    before = snapshot(out)
    with pytest.raises(SaveError) as refusal:
        write(export_of(source), SaveOptions(out, force=True))
    assert str(refusal.value) == (
        f"{out} holds {named} beside the model, which --force would delete; move it away, or "
        "choose another place"
    )
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ("{}", True),
        ('{"model_type": 3}', True),
        ('{"model_type": "qwen3_moe"', True),
        ('{"model_type": "qwen3_moe"}', False),
        ("[]", True),
        ("1" * 5000, True),
    ],
    ids=["empty", "number", "cut", "no weights", "list", "huge number"],
)
def test_a_config_json_alone_makes_no_model(
    tmp_path: Path, source: Path, config: str, weights: bool
) -> None:
    place = tmp_path / "proj"
    place.mkdir()
    (place / "config.json").write_text(config)
    if weights:
        fill(place, "model.safetensors")
    before = snapshot(place)
    with pytest.raises(SaveError, match="holds no model, so --force does not replace it"):
        write(export_of(source), SaveOptions(place, force=True))
    assert snapshot(place) == before


def test_a_directory_named_as_a_weight_file_makes_no_model(tmp_path: Path, source: Path) -> None:
    fill(tmp_path / "proj", "model.safetensors/thesis.txt")
    (tmp_path / "proj" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(SaveError, match="holds no model"):
        write(export_of(source), SaveOptions(tmp_path / "proj", force=True))


def test_an_odd_companion_that_is_written_again_as_it_is_does_not_stand_in_the_way(
    tmp_path: Path, source: Path
) -> None:
    fill(source, "helper_tables.dat")
    export = export_of(source)
    out = tmp_path / "copy"
    write(export, SaveOptions(out))
    write(export, SaveOptions(out, force=True))
    assert (out / "helper_tables.dat").read_text() == "content of helper_tables.dat"
    (out / "helper_tables.dat").write_text("edited")
    with pytest.raises(SaveError, match=r"holds helper_tables\.dat beside the model"):
        write(export, SaveOptions(out, force=True))
    assert (out / "helper_tables.dat").read_text() == "edited"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_clone_keeps_its_git_history_and_attributes(
    source: Path, out: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    fill(out, ".git/objects/ab/cdef", ".git/HEAD", ".gitattributes", ".gitignore")
    os.chmod(out / ".git" / "objects" / "ab" / "cdef", 0o444)
    history = {k: v for k, v in snapshot(out).items() if k.startswith(".git")}
    report = write(export_of(source), SaveOptions(out, force=True))
    assert {k: v for k, v in snapshot(out).items() if k.startswith(".git")} == history
    assert not any(name.startswith(".git") for name in report.files)
    assert json.loads((out / "config.json").read_text()) == tiny.QWEN3


def test_a_link_to_a_directory_is_no_part_of_a_checkpoint(
    tmp_path: Path, source: Path, out: Path
) -> None:
    fill(tmp_path / "elsewhere", "a.py")
    (out / "assets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="holds assets beside the model"):
        write(export_of(source), SaveOptions(out, force=True))


def test_a_name_too_long_for_the_file_system_is_a_sentence(tmp_path: Path, source: Path) -> None:
    name = "n" * 300
    with pytest.raises(SaveError, match=r"could not be written: .*File name too long"):
        write(export_of(source), SaveOptions(tmp_path / name))
