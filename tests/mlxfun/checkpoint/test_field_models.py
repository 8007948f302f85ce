"""Model directories as people have them: opened as stock mlx_lm does, saved consistently, or refused
in one sentence that names file, field and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from mlxfun.checkpoint import load as loading
from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.data import demo
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import ModelError, SaveError
from mlxfun.session.session import Session
from mlxfun.techniques.prune.options import SelectOptions

TOKENIZER = json.loads((demo.model_path() / "tokenizer_config.json").read_text())
TEMPLATE = TOKENIZER["chat_template"]
BARE = {key: value for key, value in TOKENIZER.items() if key != "chat_template"}
Change = Callable[[dict[str, Any]], dict[str, Any]]


def make(
    folder: Path,
    arch: str = "qwen3_moe",
    config: Change = dict,
    tensors: Change = dict,
    tokenizer: dict[str, Any] = TOKENIZER,
    wide: bool = False,
) -> Path:
    """A tiny random model of `arch` with the demo's tokenizer."""
    folder.mkdir(parents=True)
    net, settings = tiny_models.build(arch, wide=wide, vocab_size=4096)
    flat: Any = tree_flatten(net.parameters())
    weights = tensors(dict(flat))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config(settings)))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(demo.model_path() / name, folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- config.json -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt_oss", "mixtral", "ernie4_5_moe", "step3p5", "longcat_flash"])
def test_a_prune_is_saved_under_every_name_of_the_expert_count(tmp_path: Path, arch: str) -> None:
    session = Session.open(make(tmp_path / "model", arch, lambda c: {**c, "num_experts": 8}))
    layers = session.anatomy.indices
    session.select(SelectOptions(drop=dict.fromkeys(layers, (1, 6))))
    session.apply(ApplyOptions())
    session.save(SaveOptions(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    counts = {saved[key] for key in ("num_experts", session.anatomy.count_key[-1])}
    assert counts == {6}
    assert session.anatomy.count_key[-1] != "num_experts"
    stock_load(str(tmp_path / "saved"))


def test_only_what_holds_the_old_count_is_renumbered() -> None:
    anatomy = Session.open("demo").anatomy
    text = {"num_experts": 16, "num_local_experts": 4, "num_experts_per_tok": 16}
    assert anatomy.with_count({**text, "text_config": text}, 12) == {
        "num_experts": 12, "num_local_experts": 4, "num_experts_per_tok": 16,
        "text_config": {"num_experts": 12, "num_local_experts": 4, "num_experts_per_tok": 16},
    }  # fmt: skip


def test_tagged_floats_are_saved_quantised_as_they_are_saved_plain(tmp_path: Path) -> None:
    limit = [0.0, {"__float__": "Infinity"}]
    folder = make(
        tmp_path / "model", "nemotron_h", lambda c: {**c, "time_step_limit": limit}, wide=True
    )
    session = Session.open(folder)
    for name, bits in (("plain", None), ("packed", 4)):
        session.save(SaveOptions(tmp_path / name, quantize=bits, group_size=32))
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["time_step_limit"] == limit
    assert saved["quantization"]["bits"] == 4


@pytest.mark.parametrize(
    ("field", "value"), [("initializer_range", "0.02"), ("layer_types", ["full_attention"] * 7)]
)
def test_a_field_of_the_wrong_type_is_named(tmp_path: Path, field: str, value: Any) -> None:
    text = refused(make(tmp_path / "model", config=lambda c: {**c, field: value}))
    assert "config.json" in text
    assert field in text
    assert "restore the value" in text


def test_an_unknown_quantisation_is_named_with_what_can_be_done(tmp_path: Path) -> None:
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = make(
        tmp_path / "model",
        config=lambda c: {**c, "quantization_config": packed},
        tensors=lambda t: (
            t | {k + "_scale_inv": mx.ones((1, 1)) for k in t if "q_proj.weight" in k}
        ),
    )
    text = refused(folder)
    assert "config.json declares fp8 quantisation" in text
    assert "bfloat16" in text


IN_CONFIG = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]}
IN_FILE = {"producer": {"name": "modelopt", "version": "0.37"}}


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8", "MIXED_PRECISION"])
@pytest.mark.parametrize("method", [{}, {"quant_method": "modelopt"}])
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_a_checkpoint_of_nvidias_modelopt_is_named(
    tmp_path: Path, algorithm: str, method: dict[str, str], place: str
) -> None:
    """As NVIDIA writes them: settings in either file, scales under names that are not MLX's."""
    told = {"quantization_config": {**IN_CONFIG, "quant_algo": algorithm}}
    folder = make(
        tmp_path / "model",
        config=lambda c: {**c, **(told if place == "config.json" else {})},
        tensors=lambda t: (
            t | {k + "_scale_2": mx.ones(()) for k in t if k.endswith("q_proj.weight")}
        ),
    )
    settings = {"quant_algo": algorithm, "group_size": 16, "kv_cache_quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(
        json.dumps({**IN_FILE, **method, "quantization": settings})
    )
    text = refused(folder)
    assert f"{place} declares NVIDIA ModelOpt {algorithm} quantisation" in text
    assert "take a version of the model in bfloat16" in text


def test_settings_of_a_quantisation_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    for content in ("[1]", "{"):
        (folder / "hf_quant_config.json").write_text(content)
        assert "hf_quant_config.json is no JSON object: restore it" in refused(folder)


def test_layers_that_are_dropped_are_counted_no_more(tmp_path: Path) -> None:
    extra = {"model.layers.2.eh_proj.weight": mx.ones((32, 64))}
    folder = make(
        tmp_path / "model",
        "glm4_moe",
        lambda c: {**c, "num_nextn_predict_layers": 1},
        lambda t: t | extra,
    )
    Session.open(folder).save(SaveOptions(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["num_nextn_predict_layers"] == 0
    plain = make(tmp_path / "kept", "glm4_moe", lambda c: {**c, "num_nextn_predict_layers": 1})
    assert load(plain).config["num_nextn_predict_layers"] == 1


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with [brackets]", "a*b?", "ümlaut 模型", "two  spaces "])
def test_a_directory_of_any_name_is_loaded_and_read_back(tmp_path: Path, name: str) -> None:
    session = Session.open(make(tmp_path / name))
    before = session.state
    session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (1,))))
    session.apply(ApplyOptions())
    session.compact()
    session.undo()
    session.undo()
    assert session.state == before
    session.save(SaveOptions(tmp_path / "saved"))


def test_a_linked_directory_is_loaded(tmp_path: Path) -> None:
    make(tmp_path / "real [v1]")
    (tmp_path / "link").symlink_to(tmp_path / "real [v1]")
    assert load(tmp_path / "link").path == tmp_path / "link"


@pytest.mark.parametrize("name", ["x [v2]", "a*", "b?"])
def test_a_place_that_stock_loading_cannot_read_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    session = Session.open("demo")
    monkeypatch.setattr("mlxfun.checkpoint.save.write_shards", None)
    with pytest.raises(SaveError, match=r"mlx_lm\.load finds no weights"):
        session.save(SaveOptions(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


# --- tokenizer and chat template -------------------------------------------------------------


def test_a_missing_tokenizer_is_told_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(loading, "_load_lazy", None)
    assert "tokenizer.json is missing" in refused(folder)


JSON = json.dumps({"chat_template": TEMPLATE})
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("settings", "files", "origin"),
    [
        (TOKENIZER, {}, "tokenizer_config.json"),
        (BARE, {"chat_template.jinja": TEMPLATE}, "chat_template.jinja"),
        (BARE, {"chat_template.json": JSON}, "chat_template.json"),
        (BARE, {"chat_template.json": "\ufeff" + JSON}, "chat_template.json"),
        (BARE, {"chat_template.json": json.dumps({"chat_template": NAMED})}, "chat_template.json"),
        (BARE, {"processor_config.json": JSON}, "processor_config.json"),
        (BARE | {"chat_template": NAMED}, {}, "tokenizer_config.json"),
        (BARE | {"chat_template": [NAMED[0] | {"name": "chat"}]}, {}, "tokenizer_config.json"),
    ],
)
def test_a_template_is_found_wherever_it_is(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, str], origin: str
) -> None:
    folder = make(tmp_path / "model", tokenizer=settings)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    loaded = load(folder)
    assert loaded.chat_template == origin
    chat = [{"role": "user", "content": "hi"}]
    text = loaded.tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert not any("no chat template" in note for note in loaded.notes)


def test_the_absence_of_a_template_is_said_at_load_and_in_info(tmp_path: Path) -> None:
    report = Session.open(make(tmp_path / "model", tokenizer=BARE)).info()
    assert report.chat_template == ""
    assert any("no chat template" in note and "--chat-template" in note for note in report.notes)


@pytest.mark.parametrize("name", ["own.jinja", "own.json"])
def test_a_template_of_the_users_comes_before_the_models(tmp_path: Path, name: str) -> None:
    own = tmp_path / name
    text = "USER {{ messages[0].content }}"
    own.write_text(json.dumps({"chat_template": text}) if name.endswith(".json") else text)
    for settings in (TOKENIZER, BARE):
        folder = make(tmp_path / f"model{len(settings)}", tokenizer=settings)
        loaded = load(folder, chat_template=own)
        chat = [{"role": "user", "content": "hi"}]
        assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "USER hi"
        assert loaded.chat_template == str(own)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such chat template"), (b"\xff", "cannot read"), (b"  ", "is empty")],
)
def test_a_template_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    own = tmp_path / "own.jinja"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load("demo", chat_template=own)


# --- weights and cards -----------------------------------------------------------------------


def broken(name: str) -> Change:
    """A change that puts one NaN into a tensor."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        (key,) = (k for k in tensors if name in k)
        flat = mx.arange(tensors[key].size).reshape(tensors[key].shape)
        return tensors | {key: mx.where(flat == 3, float("nan"), tensors[key])}

    return change


def test_a_smoke_test_tells_the_checkpoints_faults_from_those_of_edits(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tensors=broken("layers.1.mlp.gate.weight"))
    session = Session.open(folder)
    for _ in range(2):
        report = session.smoke_test()
        assert not report.passed
        assert "the checkpoint itself holds NaN or infinity in model.layers.1.mlp.gate.weight" in (
            report.advice
        )
        assert report.checks["taps change nothing"] == "ok"
        session.select(SelectOptions(drop=dict.fromkeys(session.anatomy.indices, (7,))))


@pytest.mark.parametrize("start", ["\ufeff---\n", "---\r\n", "\n\n--- \n"])
def test_the_licence_is_kept_whatever_the_cards_bytes(tmp_path: Path, start: str) -> None:
    folder = make(tmp_path / "model")
    card = f"{start}license: mit\n---\n# card\n"
    (folder / "README.md").write_bytes(card.encode())
    Session.open(folder).save(SaveOptions(tmp_path / "saved"))
    assert "license: mit" in (tmp_path / "saved" / "README.md").read_text().splitlines()


def test_cards_survive_a_second_and_a_third_save(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    head = "---\nlicense: other\nlicense_name: own\nlanguage:\n- en\n- de\ntags: [x]\n---\n"
    (folder / "README.md").write_text(f"{head}# the first card\n")
    (folder / "LICENSE").write_text("the licence")
    for name, source in (("one", "model"), ("two", "one"), ("three", "two")):
        Session.open(tmp_path / source).save(SaveOptions(tmp_path / name))
    last = tmp_path / "three"
    assert "# the first card" in (last / "README.base.md").read_text()
    assert (last / "README.base-2.md").read_text() == (tmp_path / "one" / "README.md").read_text()
    assert (last / "README.base-3.md").read_text() == (tmp_path / "two" / "README.md").read_text()
    card = (last / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: own\nlanguage:\n- en\n- de\n")
    assert "kept as [README.base-3.md]" in card
    assert (last / "LICENSE").read_text() == "the licence"


@pytest.mark.parametrize("place", ["ümlaut 模型", "with  spaces", "linked/inside"])
def test_a_model_is_saved_to_places_of_any_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    Session.open(make(tmp_path / "model")).save(SaveOptions(tmp_path / place))
    stock_load(str(tmp_path / place))


def test_a_template_that_was_given_is_saved_with_the_model(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("USER {{ messages[0].content }}")
    session = Session.open(make(tmp_path / "model"), LoadOptions(chat_template=own))
    session.save(SaveOptions(tmp_path / "saved"))
    _, tokenizer = stock_load(str(tmp_path / "saved"))
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "USER hi"
