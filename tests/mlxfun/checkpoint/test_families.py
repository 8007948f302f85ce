"""Every architecture, pruned, saves and passes the gate, as it is and quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from mlx.utils import tree_flatten
from rigs import Rig, keep_fewer, make_rig

from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.save import Export, write
from mlxfun.errors import SaveError
from mlxfun.model.export import ExportView
from tests.families import spread
from tests.mlxfun import tiny_checkpoints


def pruned_export(rig: Rig, source: Path) -> Export:
    source.mkdir()
    rig.prune(keep_fewer(rig.anatomy))
    view = ExportView(rig.model, rig.resident, rig.anatomy, {})
    return Export(
        weights=view,
        config=view.config(rig.config),
        source=source,
        model_id="tiny",
        checkpoint_id="0",
        experts=6,
        logits=rig.model,
    )


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_a_pruned_model_of_every_family_passes_the_gate(
    name: str, rig: Callable[..., Rig], tmp_path: Path
) -> None:
    export = pruned_export(rig(name), tmp_path / "base")
    report = write(export, SaveOptions(tmp_path / "out"))
    assert report.gate["tensors"] == f"{len(export.weights.names)} identical"
    assert report.gate["logits"] == "identical"


@pytest.mark.parametrize("mode", ["affine4", "affine8", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_pruned_quantised_model_passes_the_gate(
    name: str, mode: str, rig: Callable[..., Rig], tmp_path: Path
) -> None:
    export = pruned_export(rig(name, mode=mode), tmp_path / "base")
    report = write(export, SaveOptions(tmp_path / "out"))
    assert report.gate["logits"] == "identical"
    assert report.quantization is not None


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "dbrx", "deepseek_v3"])
def test_a_pruned_model_can_be_quantised_while_saving(name: str, tmp_path: Path) -> None:
    export = pruned_export(make_rig(*tiny_models.build(name, wide=True)), tmp_path / "base")
    report = write(export, SaveOptions(tmp_path / "out", quantize=4, group_size=32))
    assert report.gate["logits"] == "identical"
    assert report.quantization == "4-bit affine, groups of 32"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4


def test_a_model_too_narrow_for_its_own_quantisation_rules_is_refused(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    # mlx-lm quantises this family's router in groups of 64, whatever was asked for.
    export = pruned_export(rig("qwen3_moe"), tmp_path / "base")
    with pytest.raises(SaveError, match=r"mlx-lm cannot quantise this model: .*group size 64"):
        write(export, SaveOptions(tmp_path / "out", quantize=4, group_size=32))


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_every_family_loads_whole_and_runs(name: str, tmp_path: Path) -> None:
    model, config = tiny_models.build(name)
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_checkpoints.write_tokenizer(tmp_path)
    loaded = load(tmp_path)
    assert loaded.stored_dtypes == {path: array.dtype for path, array in weights.items()}
    assert not any("drops" in note for note in loaded.notes)
    assert sum(a.nbytes for _, a in tree_flatten(loaded.model.parameters())) == loaded.estimate
    mx.eval(loaded.model(mx.arange(16)[None]))
