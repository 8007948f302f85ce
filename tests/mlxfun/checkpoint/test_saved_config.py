"""Every key of a saved config.json that tells of what an edit or the loading changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from rigs import keep_fewer, make_rig

from mlxfun import Session
from mlxfun.checkpoint import save as save_module
from mlxfun.checkpoint.dropped import without_mtp
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.save import write
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import SaveError
from mlxfun.model.export import ExportView
from mlxfun.techniques.prune.options import SelectOptions
from tests.families import spread
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import export_of, snapshot

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def places(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The places of a config in which expert counts stand."""
    yield config
    for key in ("text_config", "ffn_config"):
        if isinstance(config.get(key), dict):
            yield config[key]


def others(config: dict[str, Any]) -> dict[str, Any]:
    """A config without its counts."""
    found = copy.deepcopy(config)
    for node in places(found):
        for key in COUNTS:
            node.pop(key, None)
    return found


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_the_count_is_written_under_every_name_in_every_place(name: str) -> None:
    """Converters write it under the names of several architectures, as numbers or per layer."""
    model, config = tiny_models.build(name)
    named = copy.deepcopy(config)
    for node in places(named):
        node.update({key: 8 for key in COUNTS if key not in node})
    rig = make_rig(model, named)
    rig.prune(keep_fewer(rig.anatomy))
    view = ExportView(rig.model, rig.resident, rig.anatomy, {})
    saved = view.config(named)
    assert [node[key] for node in places(saved) for key in COUNTS] == [
        6 if node[key] == 8 else node[key] for node in places(named) for key in COUNTS
    ]
    assert others(saved) == others(named), "nothing else changes"
    fresh = tiny_models.empty(view.config(config))
    fresh.load_weights([(n, view.tensor(n)) for n in view.names], strict=True)
    assert mx.array_equal(rig.logits([[3, 1, 4, 1]]), fresh(mx.array([[3, 1, 4, 1]])))


def test_a_count_per_layer_is_one_of_them_only_where_all_are_the_count() -> None:
    anatomy = Session.open("demo").anatomy
    found = anatomy.with_count({"num_experts": 16, "moe_num_experts": [16, 16]}, 12)
    assert found == {"num_experts": 12, "moe_num_experts": [12, 12]}
    other = {"num_experts": 16, "moe_num_experts": [16, 8], "num_local_experts": []}
    assert anatomy.with_count(other, 12) == other | {"num_experts": 12}


def test_no_key_counts_or_promises_layers_that_were_dropped() -> None:
    config = {
        "num_nextn_predict_layers": 1, "use_mtp": True, "num_hidden_layers": 4,
        "text_config": {"mtp_num_hidden_layers": 2}, "language_config": {"num_mtp_modules": 3},
    }  # fmt: skip
    assert without_mtp(config) == {
        "num_nextn_predict_layers": 0, "use_mtp": False, "num_hidden_layers": 4,
        "text_config": {"mtp_num_hidden_layers": 0}, "language_config": {"num_mtp_modules": 0},
    }  # fmt: skip


FOUR = {"group_size": 32, "bits": 4, "mode": "affine"}
EIGHT = FOUR | {"bits": 8}


def mixed(folder: Path, arch: str) -> Path:
    """A model packed to 4 bits, with 8 for some modules, which config.json names one by one."""
    model, config = tiny_models.build(arch, wide=True, vocab_size=tiny.VOCABULARY)
    settings: dict[str, Any] = dict(FOUR)

    def how(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module["weight"].shape[-1] % 32:
            settings[path] = False
            return False
        more = ".experts.7." in path or path.endswith((".down_proj", "experts.0.w1"))
        settings[path] = dict(EIGHT if more else FOUR)
        return settings[path]

    nn.quantize(model, 32, 4, class_predicate=how)
    mx.eval(model.parameters())
    folder.mkdir()
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = config | {"quantization": settings, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("arch", ["dbrx", "qwen3_moe", "gpt_oss"])
def test_settings_of_single_modules_go_with_the_modules(
    tmp_path: Path, arch: str, compact: bool
) -> None:
    session = Session.open(mixed(tmp_path / "base", arch))
    for gone in ((1, 3), (0, 5)):
        session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, gone)))
        session.apply(ApplyOptions())
        if compact:
            session.compact()
    tokens = mx.arange(12)[None]
    expected = session.model(tokens)
    session.save(SaveOptions(tmp_path / "saved"))
    model, _ = stock_load(str(tmp_path / "saved"))
    assert mx.array_equal(model(tokens), expected)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == saved["quantization"]
    modules = dict(model.named_modules())
    for path, settings in saved["quantization"].items():
        if isinstance(settings, dict):
            assert modules[path].bits == settings["bits"], path
    if arch == "dbrx":  # the kept are 2, 4, 6 and 7
        w2 = [saved["quantization"][f"transformer.blocks.0.ffn.experts.{n}.w2"]["bits"]
              for n in range(4)]  # fmt: skip
        assert w2 == [4, 4, 4, 8]
        assert "transformer.blocks.0.ffn.experts.4.w2" not in saved["quantization"]
    session.close()


@pytest.mark.parametrize("kind", ["file", "link", "broken link", "link to a model"])
@pytest.mark.parametrize("force", [False, True])
def test_whatever_takes_the_place_in_between_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, force: bool
) -> None:
    source, out = tiny.write(tmp_path / "base", tiny.QWEN3), tmp_path / "out"
    theirs = tmp_path / "theirs"
    real = save_module.check

    def meanwhile(*arguments: Any) -> Any:
        if kind == "file":
            out.write_text("years of work")
        elif kind == "link to a model":
            tiny.write(theirs, tiny.QWEN3 | {"num_experts": 4})
            out.symlink_to(theirs)
        else:
            if kind == "link":
                theirs.mkdir()
                (theirs / "thesis.txt").write_text("years of work")
            out.symlink_to(theirs)
        return real(*arguments)

    monkeypatch.setattr(save_module, "check", meanwhile)
    with pytest.raises(SaveError) as caught:
        write(export_of(source), SaveOptions(out, force=force))
    assert str(out) in str(caught.value)
    if kind == "file":
        assert out.read_text() == "years of work"
    else:
        assert out.is_symlink()
        assert not theirs.exists() or snapshot(theirs)
        if kind == "link":
            assert snapshot(theirs) == {"thesis.txt": b"years of work"}
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_licence_and_what_belongs_to_it_survive_an_edit_on_an_edit(tmp_path: Path) -> None:
    """Each save is opened, pruned and saved again: card, licence files, and who is named as base."""
    folder = tiny.write(tmp_path / "m0", tiny.QWEN3)
    (folder / "README.md").write_text("---\r\nlicense: llama3.1\r\n---\r\n# base\r\n", "utf-8")
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice.html"):
        (folder / name).write_text(f"the {name}")
    for n in range(3):
        session = Session.open(tmp_path / f"m{n}")
        session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (0,))))
        session.apply(ApplyOptions())
        session.save(SaveOptions(tmp_path / f"m{n + 1}"))
        session.close()
    last = tmp_path / "m3"
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE", "Notice.html"):
        assert (last / name).read_text() == f"the {name}"
    assert "license: llama3.1" in (last / "README.md").read_text().splitlines()
    assert "# base" in (last / "README.base.md").read_text()
    assert json.loads((last / "config.json").read_text())["num_experts"] == 5


def test_a_place_that_opens_by_a_relative_path_alone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_of(tiny.write(tmp_path / "base", tiny.QWEN3))
    (tmp_path / "my [v2] models").mkdir()
    monkeypatch.chdir(tmp_path / "my [v2] models")
    report = write(export, SaveOptions(Path("out")))
    stock_load("out")
    with pytest.raises(FileNotFoundError):
        stock_load(str(tmp_path / "my [v2] models" / "out"))
    assert any("load it by a relative path" in notice for notice in report.notices)
    assert not any("relative" in n for n in write(export, SaveOptions(tmp_path / "b")).notices)
