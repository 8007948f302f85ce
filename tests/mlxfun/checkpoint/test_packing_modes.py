"""`save --quantize` in the modes of MLX that have one width and one group size each."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.utils import load_model, quantize_model

from mlxfun import Session
from mlxfun.checkpoint.options import MODES, Mode, SaveOptions
from mlxfun.checkpoint.save import write
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import SaveError
from mlxfun.techniques.prune.options import SelectOptions
from tests.e2e.conftest import Shell
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import export_of, on_disk


def packed(mode: Mode) -> dict[str, object]:
    bits, group_size = MODES[mode]
    return {"group_size": group_size, "bits": bits, "mode": mode}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_what_mlx_lm_makes_of_the_same_model(tmp_path: Path, mode: Mode) -> None:
    source = tiny.write(tmp_path / "base", tiny.QWEN3, shards=2)
    bits, group_size = MODES[mode]
    report = write(export_of(source), SaveOptions(tmp_path / "out", quantize=bits, mode=mode))
    assert report.quantization == f"{bits}-bit {mode}, groups of {group_size}"
    assert report.gate["logits"] == "identical"
    plain, config = load_model(source)
    expected, config = quantize_model(plain, config, group_size, bits, mode=mode)
    saved = on_disk(tmp_path / "out")
    names = dict(tree_flatten(expected.parameters()))
    assert saved.keys() == names.keys()
    for name, array in names.items():
        assert array.dtype == saved[name].dtype
        assert mx.array_equal(array, saved[name]), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization"] == json.loads(json.dumps(config["quantization"]))
    model, _ = stock_load(str(tmp_path / "out"))
    assert model.layers[0].mlp.switch_mlp.down_proj.mode == mode


def test_a_pruned_model_is_packed_while_it_is_saved_and_pruned_again(tmp_path: Path) -> None:
    session = Session.open(tiny.write(tmp_path / "base", tiny.QWEN3))
    for name in ("one", "two"):
        session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (1,))))
        session.apply(ApplyOptions())
        report = session.save(SaveOptions(tmp_path / name, quantize=4, mode="nvfp4"))
        session.close()
        session = Session.open(tmp_path / name)
    session.close()
    assert any("packed in this mode already" in notice for notice in report.notices)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["num_experts"] == 6
    assert {k: config["quantization"][k] for k in packed("nvfp4")} == packed("nvfp4")
    one, two = on_disk(tmp_path / "one"), on_disk(tmp_path / "two")
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    assert mx.array_equal(one[name][mx.array([0, 2, 3, 4, 5, 6])], two[name])


def test_weights_that_another_tool_packed_are_kept_as_they_are(tmp_path: Path) -> None:
    """NVIDIA's ModelOpt: stock mlx_lm opens it, and what is saved says so in MLX's own words."""
    model, _ = quantize_model(tiny.build(tiny.QWEN3), dict(tiny.QWEN3), 16, 4, mode="nvfp4")
    weights = dict(tree_flatten(model.parameters()))
    path = tiny.write(tmp_path / "base", tiny.QWEN3)
    for file in path.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    told = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    (path / "config.json").write_text(json.dumps(tiny.QWEN3 | {"quantization_config": told}))
    with_session = Session.open(path)
    with_session.save(SaveOptions(tmp_path / "out", quantize=4, mode="nvfp4"))
    with_session.close()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: config["quantization"][k] for k in packed("nvfp4")} == packed("nvfp4")
    saved = on_disk(tmp_path / "out")
    assert all(mx.array_equal(array, saved[name]) for name, array in weights.items())
    stock_load(str(tmp_path / "out"))


def test_a_model_packed_otherwise_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "base", tiny.QWEN3, bits=4)
    with pytest.raises(SaveError, match=r"quantised already \(4-bit affine, groups of 32\)"):
        write(export_of(source), SaveOptions(tmp_path / "out", quantize=4, mode="nvfp4"))


def test_the_command_takes_a_mode_and_no_group_size_with_it(tmp_path: Path) -> None:
    shell = Shell()
    shell.do("load demo", f"save {tmp_path / 'out'} --quantize mxfp4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["mode"] == "mxfp4"
    line = f"save {tmp_path / 'b'} --quantize nvfp4 --group-size 64"
    assert "leave out --group-size 64" in shell.refused(line, usage=True)
    shell.engine.close()
