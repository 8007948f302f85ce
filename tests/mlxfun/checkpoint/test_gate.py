"""The gate that a written model passes before it gets its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlxfun.checkpoint import gate as gate_module
from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing import shards
from mlxfun.checkpoint.save import write
from mlxfun.errors import SaveError
from mlxfun.model.device.memory import on_cpu
from tests.mlxfun import tiny_checkpoints as tiny
from tests.mlxfun.exports import Dictionary, export_of, refused, snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base", tiny.QWEN3, shards=2)


class Fickle(Dictionary):
    """Hands out another value of one tensor when asked for it again."""

    victim = "model.layers.1.mlp.gate.weight"

    def tensor(self, name: str) -> mx.array:
        array = super().tensor(name)
        return array + 1 if name == self.victim and self.asked.count(name) > 1 else array


def test_one_different_tensor_fails_the_gate_and_leaves_nothing(
    tmp_path: Path, source: Path
) -> None:
    export = export_of(source)
    fickle = Fickle(dict(export.weights.arrays))  # type: ignore[attr-defined]
    refused(tmp_path, replace(export, weights=fickle), f"{Fickle.victim} was saved as .* other")


def test_different_logits_fail_the_gate(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    wrong = export.config | {"num_experts_per_tok": 3}
    refused(tmp_path, replace(export, config=wrong), "its logits are not")


def test_a_config_that_does_not_load_fails_the_gate(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    wrong = export.config | {"num_experts": 4}
    refused(tmp_path, replace(export, config=wrong), "does not load with mlx-lm")


def test_a_missing_tensor_fails_the_gate(tmp_path: Path, source: Path) -> None:
    export = export_of(source)
    arrays = dict(export.weights.arrays)  # type: ignore[attr-defined]
    arrays.pop("model.norm.weight")
    refused(tmp_path, replace(export, weights=Dictionary(arrays)), "does not load with mlx-lm")


def test_a_write_cut_short_fails_the_gate(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards.write_file

    def cut(path: Path, *args: Any) -> None:
        real(path, *args)
        os.truncate(path, os.path.getsize(path) - 10)

    monkeypatch.setattr(shards, "write_file", cut)
    refused(tmp_path, export_of(source), "the saved model is damaged: .* is truncated")


def test_a_failing_gate_leaves_the_model_that_force_would_have_replaced(
    tmp_path: Path, source: Path
) -> None:
    export = export_of(source)
    write(export, SaveOptions(tmp_path / "out"))
    before = snapshot(tmp_path / "out")
    wrong = replace(export, config=export.config | {"num_experts_per_tok": 3})
    with pytest.raises(SaveError):
        write(wrong, SaveOptions(tmp_path / "out", force=True))
    assert snapshot(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_the_forward_never_holds_the_model(tmp_path: Path) -> None:
    config = tiny.QWEN3 | {"num_hidden_layers": 24, "moe_intermediate_size": 512}
    path = tiny.write(tmp_path / "deep", config)
    tokens = gate_module.probe_tokens(tiny.VOCABULARY)
    # On the CPU backend 16-bit weights are held in 32.
    size = (2 if on_cpu() else 1) * sum(h.file_bytes for h in read_headers(path))
    model = load_model(path, lazy=True)[0]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = gate_module.forward(model, tokens)
    assert mx.get_peak_memory() - before < 0.3 * size
    held = load_model(path)[0]
    held.set_dtype(mx.float32 if on_cpu() else mx.bfloat16)
    assert gate_module.same_bits(found, held(tokens))


def test_same_bits_tells_nan_and_zero_apart_as_the_bits_do() -> None:
    nan, zero = mx.array([float("nan")]), mx.array([0.0])
    assert gate_module.same_bits(nan, nan)
    assert not gate_module.same_bits(zero, -zero)
    assert not gate_module.same_bits(zero, zero.astype(mx.float16))
    assert not gate_module.same_bits(zero, mx.zeros((1, 1)))
    assert gate_module.same_bits(mx.array(1.5), mx.array(1.5))


# --- NaN and infinity ------------------------------------------------------------------------


def spoiled(export: Any, name: str, value: float, row: int = 0) -> Any:
    """The export with one value of a tensor, and of the resident model, replaced."""
    arrays = dict(export.weights.arrays)
    arrays[name] = mx.array(arrays[name])
    arrays[name][row] = value
    export.logits.load_weights([(name, arrays[name].astype(mx.float32))], strict=False)
    return replace(export, weights=Dictionary(arrays))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_fails_the_gate_though_every_bit_is_the_same(
    tmp_path: Path, source: Path, value: float
) -> None:
    name = "model.layers.1.mlp.gate.weight"
    refused(
        tmp_path,
        spoiled(export_of(source), name, value),
        rf"{name} holds NaN or infinity, which the checkpoint's does not; undo the edit",
    )


def test_logits_that_are_no_numbers_fail_the_gate_though_every_weight_is_finite(
    tmp_path: Path, source: Path
) -> None:
    huge = spoiled(export_of(source), "model.norm.weight", 3e38, row=slice(None))
    refused(tmp_path, huge, "logits hold NaN or infinity, which the checkpoint's do not; undo")


def test_what_the_checkpoint_has_of_it_already_is_no_fault_of_an_edit(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    broken = mx.full((8, 64), float("nan"), dtype=mx.bfloat16)
    source = tiny.write(tmp_path / "base", tiny.QWEN3, extra={name: broken})
    report = write(export_of(source), SaveOptions(tmp_path / "out"))
    assert report.gate["logits"] == "identical"


def test_whole_numbers_are_not_looked_at_for_infinity(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "base", tiny.QWEN3, bits=4)
    assert write(export_of(source), SaveOptions(tmp_path / "out")).gate["load"] == "ok"


def test_metadata_that_other_tools_could_not_read_is_refused(tmp_path: Path, source: Path) -> None:
    export = export_of(source, metadata={"amplification_metadata.json": {"scale": float("inf")}})
    refused(tmp_path, export, r"amplification_metadata\.json would hold NaN or infinity")


def test_a_config_keeps_the_infinity_that_some_architectures_have(
    tmp_path: Path, source: Path
) -> None:
    export = export_of(source)
    limit = export.config | {"time_step_limit": [0.0, float("inf")]}
    write(replace(export, config=limit), SaveOptions(tmp_path / "out"))
    assert "Infinity" in (tmp_path / "out" / "config.json").read_text()


def test_a_checkpoint_that_is_gone_excuses_no_infinity(tmp_path: Path, source: Path) -> None:
    export = spoiled(export_of(source), "model.layers.1.mlp.gate.weight", float("nan"))
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(
        tmp_path, export, "gate.weight holds NaN or infinity, and .*base cannot be read any more"
    )
