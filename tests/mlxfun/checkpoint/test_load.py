"""Loading: what is kept, what is cast, what is said, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from mlxfun.checkpoint import load as load_module
from mlxfun.checkpoint.load import estimate_bytes, load
from mlxfun.context import Context
from mlxfun.data import demo
from mlxfun.errors import BudgetError, Cancelled, ModelError
from tests.mlxfun import tiny_checkpoints as tiny

cpu_only = pytest.mark.skipif(not load_module.on_cpu(), reason="the cast is the CPU backend's")


# --- what comes back -------------------------------------------------------------------------


def test_the_demo_model_loads_with_its_facts() -> None:
    loaded = load("demo")
    assert loaded.model_id == "demo"
    assert loaded.path == demo.model_path()
    assert loaded.config == json.loads((demo.model_path() / "config.json").read_text())
    assert set(loaded.stored_dtypes.values()) == {mx.bfloat16}
    assert sum(a.size for _, a in tree_flatten(loaded.model.parameters())) == 3_192_832
    assert set(loaded.stored_dtypes) == {p for p, _ in tree_flatten(loaded.model.parameters())}
    assert loaded.tokenizer.has_chat_template


def test_a_directory_called_demo_does_not_hide_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "demo", tiny.QWEN3)
    monkeypatch.chdir(tmp_path)
    assert load("demo").path == demo.model_path()
    assert load("./demo").config["num_experts"] == 8
    assert load(Path("demo")).config["num_experts"] == 8


@cpu_only
def test_the_cpu_cast_is_exact_counted_and_said() -> None:
    loaded = load("demo")
    stock, _ = load_model(demo.model_path())
    for (path, mine), (_, theirs) in zip(
        tree_flatten(loaded.model.parameters()), tree_flatten(stock.parameters()), strict=True
    ):
        assert mine.dtype == mx.float32, path
        assert mx.array_equal(mine.astype(mx.bfloat16), theirs), path
    assert loaded.estimate == sum(a.nbytes for _, a in tree_flatten(loaded.model.parameters()))
    assert [n for n in loaded.notes if "float32" in n] == list(loaded.notes)
    assert len(loaded.notes) == 1


def test_float32_parameters_of_a_16_bit_model_keep_their_own_record(tmp_path: Path) -> None:
    bias = mx.arange(8, dtype=mx.float32) / 7
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    loaded = load(tiny.write(tmp_path / "m", tiny.DEEPSEEK_V3, extra={name: bias}))
    assert loaded.stored_dtypes[name] == mx.float32
    assert loaded.stored_dtypes["lm_head.weight"] == mx.bfloat16
    assert mx.array_equal(dict(tree_flatten(loaded.model.parameters()))[name], bias)


def test_a_quantised_model_stays_as_it_is_and_runs(tmp_path: Path) -> None:
    loaded = load(tiny.write(tmp_path / "m", tiny.QWEN3, bits=4))
    parameters = dict(tree_flatten(loaded.model.parameters()))
    assert {p: a.dtype for p, a in parameters.items()} == loaded.stored_dtypes
    assert parameters["model.layers.0.mlp.switch_mlp.up_proj.weight"].dtype == mx.uint32
    assert parameters["model.norm.weight"].dtype == mx.bfloat16
    assert loaded.notes == ()
    assert loaded.estimate == sum(a.nbytes for a in parameters.values())
    assert loaded.config["quantization"]["bits"] == 4
    mx.eval(loaded.model(mx.array([[1, 2, 3]])))


@cpu_only
def test_a_model_with_unpacked_experts_runs_although_the_rest_is_quantised(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", tiny.QWEN3)
    model, config = quantize_model(
        tiny.build(tiny.QWEN3),
        dict(tiny.QWEN3),
        32,
        4,
        quant_predicate=lambda name, _: "switch_mlp" not in name,
    )
    for file in path.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(config))
    loaded = load(path)
    experts = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    assert loaded.stored_dtypes[experts] == mx.bfloat16
    assert loaded.model(mx.array([[1, 2, 3]])).dtype == mx.float32


def test_nothing_lazy_survives_so_another_thread_can_run_the_model(tmp_path: Path) -> None:
    # Private arrays (rope frequencies here) made lazily belong to the loading thread's stream.
    config = tiny.DEEPSEEK_V3 | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        }
    }
    loaded = load(tiny.write(tmp_path / "m", config))
    results: list[object] = []

    def run() -> None:
        try:
            mx.eval(loaded.model(mx.array([[1, 2, 3]])))
            results.append("ok")
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == ["ok"]


def test_a_sharded_checkpoint_loads_and_a_stray_shard_is_pointed_out(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", tiny.QWEN3, shards=3)
    assert not any("index" in note for note in load(path).notes)
    shutil.copy(path / "model-00001-of-00003.safetensors", path / "model-old.safetensors")
    assert any("model-old.safetensors not in the index" in note for note in load(path).notes)


def test_the_model_id_of_a_directory_is_its_name_through_links(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "my-moe", tiny.QWEN3)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert load(link).model_id == "my-moe"
    assert load(str(path)).checkpoint_id == load(link).checkpoint_id


def test_a_checkpoint_packed_elsewhere_gets_the_quantisation_that_loading_derived(
    tmp_path: Path,
) -> None:
    path = tiny.write(tmp_path / "m", tiny.QWEN3)
    model = tiny.build(tiny.QWEN3)
    model, _ = quantize_model(model, dict(tiny.QWEN3), 32, 4, mode="mxfp4")
    for file in path.glob("model*"):
        file.unlink()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    raw = tiny.QWEN3 | {"quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(raw))
    loaded = load(path)
    packed = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert loaded.config["quantization"] == packed
    assert loaded.config["num_experts"] == 8


# --- parts left behind -----------------------------------------------------------------------


def test_a_dropped_vision_tower_is_said_with_its_size(tmp_path: Path) -> None:
    tower = {
        "vision_tower.blocks.0.attn.weight": mx.zeros((256, 1024), dtype=mx.bfloat16),
        "vision_tower.merger.weight": mx.zeros((256, 1024), dtype=mx.bfloat16),
    }
    loaded = load(tiny.write(tmp_path / "m", tiny.QWEN3_VL, extra=tower))
    assert "stock loading drops the vision parts (1.0 MiB); a saved model lacks it" in loaded.notes
    assert not any("further elements" in note for note in loaded.notes)
    assert loaded.config["vision_config"] == {"depth": 1, "hidden_size": 8}


def test_dropped_multi_token_prediction_layers_are_said(tmp_path: Path) -> None:
    extra = {"model.layers.61.eh_proj.weight": mx.zeros((64, 128), dtype=mx.bfloat16)}
    loaded = load(tiny.write(tmp_path / "m", tiny.DEEPSEEK_V3, extra=extra))
    assert [n for n in loaded.notes if "drops" in n] == [
        "stock loading drops the multi-token-prediction layers (16.0 KiB); a saved model lacks it"
    ]


def test_a_complete_model_is_told_nothing_about_dropped_parts(tmp_path: Path) -> None:
    for name, config in (("a", tiny.QWEN3), ("b", tiny.QWEN3_VL), ("c", tiny.DEEPSEEK_V3)):
        notes = load(tiny.write(tmp_path / name, config)).notes
        assert not any("drops" in note for note in notes)


def test_a_redundant_tied_head_is_not_a_loss(tmp_path: Path) -> None:
    config = tiny.QWEN3 | {"tie_word_embeddings": True}
    head = {"lm_head.weight": mx.zeros((4096, 64), dtype=mx.bfloat16)}
    loaded = load(tiny.write(tmp_path / "m", config, extra=head))
    assert not any("drops" in note for note in loaded.notes)


# --- refusals --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.model_path(), tmp_path / "m"))


def test_what_is_not_there_or_not_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory: /no/such/dir"):
        load("/no/such/dir")
    with pytest.raises(ModelError, match=r"is not a model directory: it has no config\.json"):
        load(tmp_path)
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(ModelError, match="is a file; name the directory"):
        load(tmp_path / "x.gguf")


def test_a_lora_adapter_is_sent_to_fuse(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"is a LoRA adapter \(adapter_config\.json\).*mlx_lm.fuse"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": \n!}', r"config\.json:2:1 is not valid JSON"),
        ("[1]", r"config\.json names no model_type"),
        ('{"hidden_size": 3}', r"config\.json names no model_type"),
        ('{"model_type": "warp_drive"}', "no architecture for model_type 'warp_drive'"),
        ('{"model_type": "qwen3_moe", "model_file": "x.py"}', r"run its own code \(x\.py\)"),
        ('{"model_type": "qwen3_moe"}', "does not load with mlx-lm: TypeError"),
    ],
)
def test_a_bad_config_is_explained(model: Path, config: str, message: str) -> None:
    (model / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        load(model)


def test_weights_that_do_not_fit_the_config_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ModelError, match=r"does not load with mlx-lm: ValueError: .* do not"):
        load(model)


def test_a_broken_tokenizer_is_named(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .* does not load"):
        load(model)


def test_a_truncated_file_is_refused_before_loading(model: Path) -> None:
    file = model / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ModelError, match="is truncated: its header needs"):
        load(model)


def test_a_model_that_does_not_fit_is_refused_with_both_figures(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "memory_limit", lambda: 1 << 20)
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: 1 << 20)
    monkeypatch.setattr(load_module, "_load_lazy", lambda path: pytest.fail("loading began"))
    figure = "12.2 MiB" if load_module.on_cpu() else "6.1 MiB"
    with pytest.raises(
        BudgetError,
        match=rf"loading m needs about {figure}.*over the 1.0 MiB.*smaller or a quantised",
    ):
        load(model)


def test_eight_bit_floats_count_unpacked_and_packed_ones_do_not(model: Path) -> None:
    from mlxfun.checkpoint.headers import Header, TensorInfo

    header = Header(model, b"", 0, 1000, {"w": TensorInfo("F8_E4M3", (1000,), 0, 1000)}, {})
    factor = 4 if load_module.on_cpu() else 2
    assert estimate_bytes([header], {}) == factor * 1000
    assert estimate_bytes([header], {"quantization": {"bits": 8}}) == 1000


def test_the_memory_limit_of_this_machine_is_known() -> None:
    assert (load_module.memory_limit() or 0) > 1 << 30


def test_a_revision_needs_a_hub_id(model: Path) -> None:
    with pytest.raises(ModelError, match="--revision v1 needs a Hub id"):
        load(model, revision="v1")


def test_loading_reports_bytes_and_can_be_cancelled(model: Path) -> None:
    class Stop(Context):
        seen = 0

        def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
            assert (label, unit, total) == ("load", "B", 6_385_664)
            self.seen = done

        def check(self) -> None:
            if self.seen > 1_000_000:
                raise Cancelled("cancelled")

    stop = Stop()
    with pytest.raises(Cancelled):
        load(model, ctx=stop)
    assert 1_000_000 < stop.seen < 6_385_664
