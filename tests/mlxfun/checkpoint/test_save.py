"""Saving: what is written, and which places are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing.shards import plan_shards
from mlxfun.checkpoint.save import write
from mlxfun.errors import BudgetError, SaveError, UsageError
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import Dictionary, export_of, on_disk, snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base", tiny.QWEN3, shards=2)


# --- what is written -----------------------------------------------------------------------------


def test_a_saved_model_is_the_loaded_one_tensor_for_tensor(tmp_path: Path, source: Path) -> None:
    report = write(export_of(source), SaveOptions(tmp_path / "out"))
    before, after = on_disk(source), on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype == mx.bfloat16
        assert mx.array_equal(array, after[name]), name
    assert report.gate == {
        "load": "ok",
        "tensors": f"{len(before)} identical",
        "logits": "identical",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == tiny.QWEN3
    again = load(tmp_path / "out")
    assert again.stored_dtypes == load(source).stored_dtypes
    assert list(tmp_path.glob(".*")) == []


def test_the_report_names_files_bytes_and_experts(tmp_path: Path, source: Path) -> None:
    report = write(export_of(source), SaveOptions(tmp_path / "a" / "b" / "out"))
    out = tmp_path / "a" / "b" / "out"
    assert report.path == str(out)
    assert report.bytes == sum(f.stat().st_size for f in out.iterdir())
    assert set(report.files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        *tiny.TOKENIZER_FILES,
    }
    assert (report.experts, report.quantization) == (8, None)


def test_float32_parameters_of_a_16_bit_model_stay_float32(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = {name: mx.arange(8, dtype=mx.float32) / 7}
    source = tiny.write(tmp_path / "base", tiny.DEEPSEEK_V3, extra=bias)
    write(export_of(source), SaveOptions(tmp_path / "out"))
    saved = on_disk(tmp_path / "out")
    assert mx.array_equal(saved[name], bias[name])
    assert saved["lm_head.weight"].dtype == mx.bfloat16


def test_a_quantised_model_is_saved_packed_as_it_is(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "base", tiny.QWEN3, bits=4)
    report = write(export_of(source), SaveOptions(tmp_path / "out"))
    before, after = on_disk(source), on_disk(tmp_path / "out")
    assert {n: a.dtype for n, a in before.items()} == {n: a.dtype for n, a in after.items()}
    assert all(mx.array_equal(before[n], after[n]) for n in before)
    assert report.quantization == "4-bit affine, groups of 32"
    weights = "model.safetensors"
    old = (source / "model-00001-of-00001.safetensors").stat().st_size
    assert abs((tmp_path / "out" / weights).stat().st_size - old) < 64


def test_shards_stay_within_the_limit_and_the_index_finds_every_tensor(
    tmp_path: Path, source: Path
) -> None:
    export = export_of(source)
    limit = 200_000
    report = write(export, SaveOptions(tmp_path / "out", max_shard_bytes=limit))
    shards = sorted(f for f in report.files if f.endswith(".safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in shards:
        arrays = mx.load(str(tmp_path / "out" / file))
        assert sum(a.nbytes for a in arrays.values()) <= limit or len(arrays) == 1
        assert all(index["weight_map"][name] == file for name in arrays)
    assert set(index["weight_map"]) == set(export.weights.names)
    assert index["metadata"]["total_size"] == sum(
        export.weights.nbytes(n) for n in export.weights.names
    )


def test_shards_are_planned_in_order() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}
    weights = Dictionary({n: mx.zeros(s, dtype=mx.uint8) for n, s in sizes.items()})
    assert plan_shards(weights, 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_companion_files_are_copied_and_foreign_weights_are_not(
    tmp_path: Path, source: Path
) -> None:
    wanted = {
        "LICENSE": "MIT",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": "{}",
        "preprocessor_config.json": "{}",
        "tokenization_custom.py": "x = 1",
        "additional_chat_templates/tool_use.jinja": "tools",
    }
    (source / "additional_chat_templates").mkdir()
    for name, text in wanted.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Base\n")
    unwanted = ("pytorch_model.bin", "consolidated.safetensors", "x.gguf", ".gitattributes")
    for name in (*unwanted, "hf_quant_config.json", "pytorch_model.bin.index.json"):
        (source / name).write_text("{}")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    write(export_of(source), SaveOptions(tmp_path / "out"))
    out = snapshot(tmp_path / "out")
    assert {name: out[name].decode() for name in wanted} == wanted
    assert out["README.base.md"].endswith(b"# Base\n")
    assert not {*unwanted, "hf_quant_config.json", "original/params.json"} & set(out)
    card = out["README.md"].decode()
    assert "license: apache-2.0\n" in card
    assert "language:\n- en\nlibrary_name" in card.split("---")[1]


def test_files_behind_links_are_copied_as_files(tmp_path: Path, source: Path) -> None:
    # A snapshot in the Hub's cache consists of links.
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in source.iterdir():
        (links / file.name).symlink_to(file)
    write(export_of(links), SaveOptions(tmp_path / "out"))
    assert not any(f.is_symlink() for f in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size > 1000


def test_links_to_files_that_are_not_the_models_are_left_out_and_named(
    tmp_path: Path, source: Path
) -> None:
    (tmp_path / "id_ed25519").write_text("xprivatex")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "netrc").write_text("xpasswordx")
    (source / "LICENSE").symlink_to(tmp_path / "id_ed25519")
    (source / "NOTICE").symlink_to(Path("..") / "secrets" / "netrc")
    (source / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    (source / "USE_POLICY.md").write_text("be kind")
    (source / "POLICY").symlink_to("USE_POLICY.md")
    report = write(export_of(source), SaveOptions(tmp_path / "out"))
    out = snapshot(tmp_path / "out")
    assert not [name for name, data in out.items() if b"xprivatex" in data or b"xpasswordx" in data]
    assert out["POLICY"] == b"be kind"
    assert report.notices == (
        "not copied, since they are links that lead out of the model's directory: LICENSE, NOTICE, "
        "additional_chat_templates/netrc",
    )


def test_a_snapshot_of_the_hubs_cache_is_copied_whole(tmp_path: Path, source: Path) -> None:
    repo = tmp_path / "models--a--b"
    blobs, snap = repo / "blobs", repo / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snap.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snap / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (snap / "LICENSE").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("mine")
    report = write(export_of(snap), SaveOptions(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size > 1000
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert "LICENSE" in report.notices[0]


def test_a_tokenizer_behind_a_foreign_link_is_written_from_memory(
    tmp_path: Path, source: Path
) -> None:
    (source / "tokenizer.json").rename(tmp_path / "t.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "t.json")
    loaded = load(source)
    write(export_of(source, tokenizer=loaded.tokenizer), SaveOptions(tmp_path / "out"))
    text = "A word, and another."
    assert load(tmp_path / "out").tokenizer.encode(text) == loaded.tokenizer.encode(text)


def test_metadata_files_and_the_card_tell_what_was_done(tmp_path: Path, source: Path) -> None:
    metadata = {"reap_metadata.json": {"metric": "reap_sum", "keep_map": {"1": [0, 2]}}}
    export = export_of(
        source,
        model_id="some/base",
        metadata=metadata,
        recipe=("collect --dataset demo:mixed", "prune --n-prune 2"),
        scores={"perplexity demo:eval": 24.6712345, "KL": 0.03},
    )
    write(export, SaveOptions(tmp_path / "out"))
    assert (
        json.loads((tmp_path / "out" / "reap_metadata.json").read_text())
        == metadata["reap_metadata.json"]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    assert 'base_model: "some/base"' in card
    assert "collect --dataset demo:mixed\nprune --n-prune 2\n" in card
    assert "| perplexity demo:eval | 24.6712 |" in card
    assert "8 experts per layer" in card


def test_settings_of_an_undone_quantisation_are_dropped(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    unpacked = export.config | {"quantization_config": {"quant_method": "fp8"}}
    write(replace(export, config=unpacked), SaveOptions(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


# --- --quantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_while_saving_is_what_mlx_lm_makes_of_the_saved_model(
    tmp_path: Path, source: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm.utils import quantize_model

    export = export_of(source)
    report = write(export, SaveOptions(tmp_path / "out", quantize=bits, group_size=32))
    assert capsys.readouterr().out == ""
    assert report.quantization == f"{bits}-bit affine, groups of 32"
    assert report.gate["logits"] == "identical"
    plain, config = load_model(source)
    expected, config = quantize_model(plain, config, 32, bits)
    saved = on_disk(tmp_path / "out")
    for name, array in tree_flatten(expected.parameters()):
        assert array.dtype == saved[name].dtype
        assert mx.array_equal(array, saved[name]), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization"] == json.loads(json.dumps(config["quantization"]))
    assert export.config == tiny.QWEN3


@pytest.mark.parametrize(
    ("bits", "group_size", "error", "message"),
    [
        (7, 64, UsageError, "--quantize 7: choose one of 2, 3, 4, 5, 6, 8 bits"),
        (4, 48, UsageError, "group size 48: choose one of 32, 64, 128"),
        (4, 128, SaveError, "nothing in this model can be quantised in groups of 128"),
    ],
)
def test_impossible_quantisations_are_refused(
    tmp_path: Path, source: Path, bits: int, group_size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write(
            export_of(source), SaveOptions(tmp_path / "out", quantize=bits, group_size=group_size)
        )
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "base", tiny.QWEN3, bits=4)
    with pytest.raises(SaveError, match=r"quantised already \(4-bit affine, groups of 32\)"):
        write(export_of(source), SaveOptions(tmp_path / "out", quantize=8))


# --- places that are refused ---------------------------------------------------------------------


def test_the_source_its_parents_and_its_inside_are_never_written_to(
    tmp_path: Path, source: Path
) -> None:
    export = export_of(source)
    before = snapshot(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for place, relation in (
        (source, "is"),
        (link, "is"),
        (source / ".." / "base", "is"),
        (source / "inner", "lies inside"),
        (link / "inner", "lies inside"),
        (tmp_path, "holds"),
    ):
        with pytest.raises(SaveError, match=f"{relation} the directory the model was loaded from"):
            write(export, SaveOptions(place, force=True))
    assert snapshot(source) == before


def test_the_files_behind_a_linked_source_are_safe_too(tmp_path: Path, source: Path) -> None:
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in source.iterdir():
        (links / file.name).symlink_to(file)
    with pytest.raises(SaveError, match=r"holds the files that .*snapshot links to"):
        write(export_of(links), SaveOptions(source, force=True))
    assert load(links).checkpoint_id


def test_existing_output_needs_force_and_force_needs_a_model(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    out = tmp_path / "out"
    out.mkdir()
    write(export, SaveOptions(out))  # an empty directory is no loss
    with pytest.raises(SaveError, match="out is not empty; choose another place or add --force"):
        write(export, SaveOptions(out))
    (out / "stale.safetensors").write_text("old")
    write(export, SaveOptions(out, force=True))
    assert not (out / "stale.safetensors").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(SaveError, match="holds no model, so --force does not replace it"):
        write(export, SaveOptions(tmp_path / "home", force=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file; name a directory"):
        write(export, SaveOptions(tmp_path / "file", force=True))
    with pytest.raises(SaveError, match="could not be written"):
        write(export, SaveOptions(tmp_path / "file" / "out"))


def test_a_full_disk_is_noticed_before_the_first_byte(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_of(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=16 << 20))
    with pytest.raises(BudgetError, match=r"needs 16\.\d MiB of disk space and 16.0 MiB is free"):
        write(export, SaveOptions(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_shards_of_nothing_are_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="shards of 0 bytes"):
        write(export_of(source), SaveOptions(tmp_path / "out", max_shard_bytes=0))


def test_force_does_not_pull_the_current_directory_away(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_of(source)
    write(export, SaveOptions(tmp_path / "out"))
    (tmp_path / "out" / "notes").mkdir()
    for place in ("out", "out/notes"):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(SaveError, match="is or holds the current directory"):
            write(export, SaveOptions(tmp_path / "out", force=True))
