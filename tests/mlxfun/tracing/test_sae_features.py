"""Autoencoders in files as SAELens has them, their features, and interventions with them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tracing_rigs import bits, tiny

from mlxfun import Session
from mlxfun.errors import DatasetError, ModelError, UsageError
from mlxfun.tracing.interventions import add_vector
from mlxfun.tracing.options import SaeUseOptions
from mlxfun.tracing.sae.autoencoder import Autoencoder
from mlxfun.tracing.sae.features import clamp_feature, feature_activity, steer_feature
from mlxfun.tracing.sae.files import hook_name, load_sae, our_name, require_fitting_sae, save_sae
from mlxfun.tracing.sae.sources import ModelSource

ROWS = [[3, 14, 15, 9, 26, 5], [5, 6, 7, 8, 9, 10], [1, 2, 3], [9, 8, 7, 6], [2, 4, 6, 8, 10]]
D, F = 32, 40
AT = "layers.1.residual"


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found["threshold"] = np.abs(found["threshold"])
    return found


def made(k: int | None = None, **more) -> Autoencoder:
    arrays = {name: mx.array(a) for name, a in random_arrays().items()}
    if k is not None:
        arrays.pop("threshold")
    return Autoencoder(**arrays, at=AT, k=k, **more)


def plain_features(directory: Path, x: np.ndarray) -> np.ndarray:
    """A forward written down from the layout, one value and feature at a time, in float64."""
    cfg = json.loads((directory / "cfg.json").read_text())
    w = {
        k: a.astype(np.float64) for k, a in load_file(directory / "sae_weights.safetensors").items()
    }
    found = np.zeros((len(x), cfg["d_sae"]))
    for row, value in enumerate(x.astype(np.float64)):
        inner = value - w["b_dec"] if cfg["apply_b_dec_to_input"] else value
        z = [sum(inner[i] * w["W_enc"][i, f] for i in range(cfg["d_in"])) + w["b_enc"][f]
             for f in range(cfg["d_sae"])]  # fmt: skip
        if cfg["architecture"] == "topk":
            chosen = sorted(range(len(z)), key=lambda f: -z[f])[: cfg["k"]]
        else:
            chosen = [f for f in range(len(z)) if z[f] > w["threshold"][f]]
        for f in chosen:
            found[row, f] = max(z[f], 0.0)
    return found


@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("centred", [True, False])
def test_what_we_write_another_reader_computes_alike(tmp_path, k, centred) -> None:
    sae = made(k, centred=centred, skip=2, about={"state": "abc"})
    x = np.random.default_rng(1).standard_normal((9, D)).astype(np.float32)
    save_sae(sae, tmp_path / "sae")
    assert np.allclose(
        np.array(sae.encode(mx.array(x))), plain_features(tmp_path / "sae", x), atol=1e-4
    )
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["d_sae"], cfg["normalize_activations"]) == (D, F, "none")
    assert cfg["architecture"] == ("jumprelu" if k is None else "topk")
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert cfg["metadata"]["sae_lens_version"] >= "6"  # else it reads them as older keys
    back = load_sae(tmp_path / "sae")
    assert (back.at, back.k, back.centred, back.skip) == (AT, k, centred, 2)
    assert back.about == {"state": "abc"}
    assert np.array_equal(np.array(back.encode(mx.array(x))), np.array(sae.encode(mx.array(x))))
    assert np.array_equal(
        np.array(back.reconstruct(mx.array(x))), np.array(sae.reconstruct(mx.array(x)))
    )


def write(directory: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    (directory / "cfg.json").write_text(json.dumps(config))
    save_file(arrays, directory / "sae_weights.safetensors")
    return directory


OLD = {"d_in": D, "d_sae": F, "hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1,
       "finetuning_scaling_factor": False, "normalize_activations": "none"}  # fmt: skip


def test_older_configurations_are_read(tmp_path) -> None:
    x = mx.array(np.random.default_rng(1).standard_normal((9, D)).astype(np.float32))
    all_five = random_arrays()
    four = {name: a for name, a in all_five.items() if name != "threshold"}
    z = (np.array(x) - four["b_dec"]) @ four["W_enc"] + four["b_enc"]

    standard = load_sae(write(tmp_path / "a", OLD | {"architecture": "standard"}, four))
    assert standard.at == "layers.1.input"
    assert np.allclose(np.array(standard.encode(x)), np.maximum(z, 0), atol=1e-4)

    oldest = {"d_in": D, "d_sae": F, "hook_point": "blocks.1.hook_mlp_out", "hook_point_layer": 1,
              "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}  # fmt: skip
    by_k = load_sae(write(tmp_path / "b", oldest, four))
    assert (by_k.at, by_k.k, by_k.kind) == ("layers.1.mlp.output", 3, "topk")

    in_logs = {**four, "log_threshold": np.log(all_five["threshold"])}
    jump = load_sae(write(tmp_path / "c", OLD | {"architecture": "jumprelu"}, in_logs))
    assert np.allclose(np.array(jump.threshold), all_five["threshold"], rtol=1e-5)

    scaled = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    folded = load_sae(write(tmp_path / "d", OLD | scaled, four))
    norm = np.linalg.norm(four["W_dec"], axis=1)
    order = np.argsort(-z * norm, axis=1)[:, :4]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, order, np.maximum(np.take_along_axis(z * norm, order, 1), 0), 1)
    expected = kept / norm @ four["W_dec"] + four["b_dec"]
    assert np.allclose(np.array(folded.reconstruct(x)), expected, atol=1e-3)


def test_what_cannot_be_carried_out_exactly_is_refused(tmp_path) -> None:
    arrays = random_arrays()
    for number, (key, value) in enumerate({"architecture": "gated", "reshape_activations": "hook_z",
                                           "normalize_activations": "layer_norm"}.items()):  # fmt: skip
        with pytest.raises(DatasetError, match=str(value)):
            load_sae(write(tmp_path / str(number), OLD | {key: value}, arrays))
    with pytest.raises(DatasetError, match="holds no autoencoder"):
        load_sae(tmp_path)
    with pytest.raises(ModelError, match="has no W_dec"):
        load_sae(write(tmp_path / "x", OLD, {k: a for k, a in arrays.items() if k != "W_dec"}))
    with pytest.raises(ModelError, match="b_dec is"):
        load_sae(write(tmp_path / "y", OLD, arrays | {"b_dec": arrays["b_enc"]}))
    with pytest.raises(UsageError, match="which value"):
        load_sae(write(tmp_path / "z", {"architecture": "jumprelu"}, arrays))
    with pytest.raises(UsageError, match="of 32 values"):
        require_fitting_sae(made(), tiny("llama", "affine4"), "x")


def test_names_go_to_transformer_lens_and_back() -> None:
    for name in ("layers.3.residual", "layers.0.input", "layers.11.attn.output", "layers.2.mlp.output",
                 "embed", "layers.1.experts.7.output"):  # fmt: skip
        assert our_name(hook_name(name)) == name
    assert hook_name("layers.0.input") == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize("k", [None, 6])
def test_the_largest_values_and_the_density_are_those_of_a_plain_loop(monkeypatch, k) -> None:
    monkeypatch.setattr("mlxfun.tracing.sae.autoencoder.CHUNK", 3 * F)
    monkeypatch.setattr("mlxfun.tracing.sae.features.READ_TOKENS", 8)
    model, sae = tiny("llama"), made(k)
    found = feature_activity(sae, ModelSource(model, ROWS, AT, skip=1), examples=3)
    told = []
    for number, row in enumerate(ROWS):
        with model.trace(row) as t:
            saved = t[AT].save()
        active = np.array(sae.encode(saved.value[0]))
        told += [(number, at, active[at]) for at in range(1, len(row))]
    assert found.tokens == len(told) == 19
    for feature in range(F):
        values = np.array([one[2][feature] for one in told])
        assert found.density[feature] == pytest.approx((values > 0).mean())
        assert np.allclose(found.values[feature], np.sort(values)[::-1][:3], atol=1e-3)
        for value, (row, at) in zip(found.values[feature], found.places[feature], strict=True):
            own = next(one[2][feature] for one in told if one[:2] == (row, at)) if value > 0 else 0
            assert value == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("k", [None, 6])
def test_a_clamped_feature_is_at_its_level_and_the_rest_stays(k) -> None:
    sae = made(k)
    x = mx.array(np.random.default_rng(2).standard_normal((1, 5, D)).astype(np.float32))
    model = tiny("llama")
    before = np.array(sae.encode(x))
    with model.trace(ROWS[1][:5]) as t:
        t.edit(AT, x)
        t.edit(AT, clamp_feature(sae, 7, 2.5))
        after = t[AT].save()
    expected = np.array(x) + (2.5 - before[..., 7:8]) * np.array(sae.W_dec)[7]
    assert np.allclose(after.numpy(), expected, atol=1e-4)
    with pytest.raises(UsageError, match="there is no feature 40: the autoencoder has 40, 0 to 39"):
        clamp_feature(sae, 40, 1.0)


def test_steering_adds_the_features_direction_in_the_models_dtype() -> None:
    model, sae = tiny("llama"), made()
    model.parts.model.set_dtype(mx.bfloat16)
    outputs = []
    for change in (steer_feature(sae, 3, 2.0), add_vector(np.array(sae.W_dec)[3], 2.0),
                   clamp_feature(sae, 3, 50.0)):  # fmt: skip
        with model.trace(ROWS[0]) as t:
            t.edit(AT, change)
            outputs.append(model.output.save())
    assert all(one.dtype == mx.bfloat16 for one in outputs)
    assert np.array_equal(outputs[0].numpy(), outputs[1].numpy())
    assert not np.array_equal(outputs[0].numpy(), outputs[2].numpy())


def test_features_stand_in_a_session_and_are_told_apart(tmp_path) -> None:
    with closing(Session.open("demo")) as session:
        wide = {"W_enc": (128, 16), "b_enc": (16,), "W_dec": (16, 128), "b_dec": (128,)}
        rng = np.random.default_rng(0)
        arrays = {n: mx.array(rng.standard_normal(s).astype(np.float32)) for n, s in wide.items()}
        save_sae(Autoencoder(**arrays, at="layers.2.residual", k=4), tmp_path / "a")
        tokens = mx.array([session.tokenizer.encode("def area(circle):")])
        plain = bits(session.model(tokens))
        seen = {plain}
        for more in ({"strength": 3.0}, {"level": 4.0}, {"level": 5.0}):
            options = SaeUseOptions(tmp_path / "a", 3, **more)
            name, change = session.sae_change(options)
            report = session.intervene(name, change, "a")
            assert report.interventions[0].words in (
                "steer_feature(3, 3)", "clamp_feature(3, 4)", "clamp_feature(3, 5)",
            )  # fmt: skip
            seen.add(bits(session.model(tokens)))
        assert len(seen) == 4
        session.undo()
        session.clear_interventions()
        assert bits(session.model(tokens)) == plain
        with pytest.raises(UsageError, match="one of both"):
            session.sae_change(SaeUseOptions(tmp_path / "a", 3))
