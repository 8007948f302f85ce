"""What is said of a model from its headers is what loading it takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from slot_rigs import Slotted, on_disk, unstacked

from mlxfun.errors import ModelError
from mlxfun.memory.plan import headers
from mlxfun.memory.plan.bandwidth import READ_BYTES, disk_bandwidth
from mlxfun.memory.plan.fit import Machine, fit, hit_rate
from mlxfun.memory.plan.headers import Entry, Outline, outline
from mlxfun.memory.plan.parts import parts_of
from mlxfun.model.anatomy.discover import discover
from mlxfun.model.parameters import flatten
from mlxfun.session.plan_memory import MemoryOptions, plan_memory

GIB = 1 << 30


def qwen(path: Path, **changes: Any) -> Path:
    model, config = tiny_models.build("qwen3_moe", **changes)
    return on_disk(path, model, config)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "nemotron_h"])
def test_bytes_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model, config = tiny_models.build(name)
    path = on_disk(tmp_path, model, config)
    parts = parts_of(outline(str(path)))
    some = Slotted.open(path, 3)
    assert parts.whole == sum(array.nbytes for _, array in flatten(model.parameters()))
    assert parts.kept == some.partly.kept_bytes
    assert parts.one_each == some.slots.slot_bytes
    found = discover(some.model, config)
    assert (parts.experts, parts.top_k) == (found.num_experts, found.top_k)
    some.close()


def test_experts_stored_one_by_one_count_alike(tmp_path: Path) -> None:
    stacked = parts_of(outline(str(qwen(tmp_path / "a"))))
    path = unstacked(qwen(tmp_path / "b"), {"mlp.switch_mlp.": "mlp.experts.{e}."})
    assert parts_of(outline(str(path))) == stacked


def test_what_load_then_holds(tmp_path: Path) -> None:
    path = qwen(tmp_path)
    parts = parts_of(outline(str(path)))
    need = parts.kept + 4 * parts.one_each
    report = fit("x", parts, Machine(int(need / 0.8) + 1))
    assert (report.fit, report.capacity, report.held) == ("partly", 4, need)
    assert "load x --capacity 4" in report.summary()
    some = Slotted.open(path, report.capacity)
    assert some.partly.kept_bytes + some.slots.nbytes == report.held
    some.close()
    assert fit("x", parts, Machine(parts.whole)).fit == "whole"
    assert fit("x", parts, Machine(parts.whole - 1)).fit == "partly"
    tight = fit("x", parts, Machine(int((parts.kept + parts.one_each) / 0.8)))
    assert tight.capacity == 0  # fewer than a token uses
    assert fit("x", parts, Machine(1000)).fit == "no"


def test_hits_that_recorded_routing_foretells(tmp_path: Path) -> None:
    parts = parts_of(outline(str(qwen(tmp_path))))
    used = np.array([[9, 1, 0, 0, 0, 0, 0, 0]] * len(parts.expert_bytes), np.float64)
    layers = len(parts.expert_bytes)
    assert hit_rate(parts, [1] * layers, used) == pytest.approx(0.9)
    assert hit_rate(parts, [2] * layers, None) == 0.25
    machine = Machine(int((parts.kept + 2 * parts.one_each) / 0.8) + 1, bandwidth=1e9)
    plain = fit("x", parts, machine)
    assert plain.tokens_per_second == pytest.approx(1e9 / (0.75 * 2 * parts.one_each))
    assert fit("x", parts, machine, used).tokens_per_second is None  # nothing is missed


def test_prunes_are_priced(tmp_path: Path) -> None:
    parts = parts_of(outline(str(qwen(tmp_path))))
    report = fit("x", parts, Machine(parts.pruned(4)))
    assert [(level.left, level.bytes, level.fits) for level in report.levels] == [
        (6, parts.whole - 2 * parts.one_each, False),
        (4, parts.whole - 4 * parts.one_each, True),
        (2, parts.whole - 6 * parts.one_each, True),
    ]


def test_half_precision_counts_double_where_it_is_widened(tmp_path: Path) -> None:
    model, config = tiny_models.build("qwen3_moe")
    model.set_dtype(mx.bfloat16)
    found = outline(str(on_disk(tmp_path, model, config)))
    assert parts_of(found, widened=True).whole == 2 * parts_of(found).whole


def test_dense_models_fit_or_do_not(tmp_path: Path) -> None:
    model, config = tiny_models.build("llama")
    parts = parts_of(outline(str(on_disk(tmp_path, model, config))))
    assert (parts.experts, parts.one_each) == (0, 0)
    report = fit("x", parts, Machine(parts.whole - 1))
    assert (report.capacity, report.levels, report.hit_rate) == (0, (), None)


class Hub:
    """The Hub's client with one model of two files, of which nothing may be downloaded."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        found = headers.read_headers(path)
        files = {
            header.path.name: SimpleNamespace(
                tensors={
                    name: SimpleNamespace(
                        dtype=i.dtype, shape=list(i.shape), data_offsets=(i.start, i.end)
                    )
                    for name, i in header.tensors.items()
                }
            )
            for header in found
        }

        def metadata(repo: str, revision: str | None = None) -> Any:
            self.asked.append(f"headers of {repo}")
            return SimpleNamespace(files_metadata=files)

        def download(repo: str, file: str, revision: str | None = None) -> str:
            self.asked.append(file)
            return str(path / file)

        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_model_on_the_hub_is_planned_before_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = qwen(tmp_path)
    hub = Hub(path, monkeypatch)
    report = plan_memory(MemoryOptions("some/model", memory=GIB))
    assert hub.asked == ["headers of some/model", "config.json"]
    assert report.whole == parts_of(outline(str(path))).whole
    assert report.bandwidth is None


def test_what_the_hub_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    with pytest.raises(ModelError, match="no route to host"):
        outline("some/model")
    with pytest.raises(ModelError, match="is no directory"):
        outline("./nowhere")


def test_counts_that_contradict_each_other_are_named() -> None:
    entries = tuple(
        Entry(f"model.layers.{i}.mlp.switch_mlp.up_proj.weight", "F32", (n, 2, 2), n * 16)
        for i, n in enumerate((4, 6))
    )
    with pytest.raises(ModelError, match=r"config\.json says 5 and the stacks hold 4, 6"):
        parts_of(Outline("x", entries, {"num_experts": 5}, None))


def test_the_disk_is_measured_on_the_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(6 * READ_BYTES))
    found = disk_bandwidth(tmp_path)
    assert found is not None
    assert found > 1 << 20
    file.write_bytes(b"small")
    assert disk_bandwidth(tmp_path) is None


def test_the_machine_is_asked_where_no_size_is_given(tmp_path: Path) -> None:
    report = plan_memory(MemoryOptions(str(qwen(tmp_path))))
    assert report.memory > GIB
    assert report.fit == "whole"


def test_weights_of_16_bits_are_said_to_be_counted_in_16_or_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny_models.build("qwen3_moe")
    model.set_dtype(mx.bfloat16)
    path = str(on_disk(tmp_path / "half", model, config))
    stored = parts_of(outline(path)).whole
    here = plan_memory(MemoryOptions(path))
    there = plan_memory(MemoryOptions(path, memory=GIB))
    assert (here.bits, here.whole, here.otherwise) == (32, 2 * stored, stored)
    assert (there.bits, there.whole, there.otherwise) == (16, stored, 2 * stored)
    assert "in 32 bits, as MLX's CPU backend holds them" in here.note
    assert "on MLX's CPU backend the whole model takes" in there.note
    monkeypatch.setattr("mlxfun.session.plan_memory.on_cpu", lambda: False)
    assert plan_memory(MemoryOptions(path)).bits == 16
    assert plan_memory(MemoryOptions(str(qwen(tmp_path / "full")))).note == ""


@pytest.mark.parametrize(
    ("settings", "times"), [({}, 2), ({"quantization_config": {"quant_method": "mxfp8"}}, 1)]
)
def test_floats_of_8_bits_take_what_stock_loading_unpacks_them_to(
    settings: dict[str, Any], times: int
) -> None:
    entries = tuple(
        Entry(f"model.layers.0.mlp.experts.{e}.up_proj.weight", "F8_E4M3", (4, 4), 16)
        for e in range(4)
    )
    found = parts_of(Outline("x", entries, {"num_experts": 4, **settings}, None))
    assert found.whole == times * 64
