"""Steering vectors in biases: what a bias can hold comes out as it was steered, the rest is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun import Session
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.router_bias.options import BakeOptions
from mlxfun.techniques.vector_bias.reports import VectorReport
from mlxfun.tracing.interventions import add_vector, clamp, scale, zero_out
from mlxfun.tracing.vectors.vectors import SteeringVectors, save_vectors
from tests.mlxfun import tiny_checkpoints

TOKENS = mx.array([[5, 17, 300, 4000, 9, 2, 77]])


def checkpoint(path: Path, name: str, dtype: mx.Dtype = mx.float32, **more) -> Path:
    config = copy.deepcopy(tiny_models.DENSE[name]) | {"vocab_size": 4096} | more
    return tiny_checkpoints.write(path / name, config, dtype=dtype)


def logits(session: Session) -> np.ndarray:
    return np.array(session.model(TOKENS).astype(mx.float32))


def vector(width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "starcoder2"])
@pytest.mark.parametrize("at", ["layers.1.residual", "layers.1.mlp.output", "layers.1.attn.output",
                                "layers.0-2.residual", "norm"])  # fmt: skip
def test_a_bias_holds_what_is_added_at_every_token(tmp_path, name: str, at: str) -> None:
    session = Session.open(checkpoint(tmp_path, name))
    plain = logits(session)
    session.intervene(at, add_vector(vector(), 0.5))
    steered = logits(session)
    report = session.bake(BakeOptions())
    assert isinstance(report, VectorReport)
    assert len(report.held) == (3 if "0-2" in at else 1)
    assert session.editor.steering.empty
    tolerance = 1e-4 * np.abs(steered - plain).max() + 1e-5
    assert np.abs(steered - plain).max() > 100 * tolerance
    assert np.abs(logits(session) - steered).max() < tolerance
    session.flip("base")
    assert np.array_equal(logits(session), steered)
    session.flip("candidate")
    session.apply(ApplyOptions())
    baked = logits(session)
    assert session.editor.steering.empty
    session.save(SaveOptions(tmp_path / "saved"))
    session.undo()
    assert np.array_equal(logits(session), steered)
    session.close()
    said = json.loads((tmp_path / "saved" / "vectors_metadata.json").read_text())
    assert [row["bias"] for row in said["vectors"]] == [path for _, _, path, _ in report.held]
    again = Session.open(tmp_path / "saved")
    assert np.array_equal(logits(again), baked)
    again.close()


def test_several_vectors_at_one_bias_are_summed(tmp_path) -> None:
    session = Session.open(checkpoint(tmp_path, "gpt2"))
    session.intervene("layers.1.residual", add_vector(vector(seed=1)))
    session.intervene("layers.1.mlp.output", add_vector(vector(seed=2)))
    steered = logits(session)
    report = session.bake(BakeOptions())
    assert len({path for _, _, path, _ in report.held}) == 1
    assert np.allclose(logits(session), steered, atol=1e-4)
    again = session.bake(BakeOptions())  # in place of the staged one, whose side runs without
    assert (again.held, again.state_after) == (report.held, report.state_after)
    session.discard()
    assert np.array_equal(logits(session), steered)
    session.close()


@pytest.mark.parametrize(
    ("name", "more", "at", "words"),
    [
        ("llama", {}, "layers.1.residual", "has a bias, and a weight holds no constant"),
        ("llama", {}, "norm", "has a bias"),
        ("gpt2", {}, "layers.1.input", "nothing that writes layers.1.input"),
        ("gpt2", {}, "embed", "nothing that writes embed"),
        # Its bias is multiplied by residual_multiplier on the way to the stream.
        ("granite", {"mlp_bias": True, "residual_multiplier": 0.25}, "layers.1.residual",
         "does not come to layers.1.residual unchanged"),
        # Only attention has a bias, and the feed-forward part behind it would see the vector.
        ("llama", {"attention_bias": True}, "layers.1.residual", "does not come to"),
    ],
)  # fmt: skip
def test_where_it_would_not_be_exact_it_is_refused_and_nothing_changes(
    tmp_path, name: str, more: dict, at: str, words: str
) -> None:
    session = Session.open(checkpoint(tmp_path, name, **more))
    session.intervene(at, add_vector(vector()))
    steered = logits(session)
    with pytest.raises(PlanError, match=words):
        session.bake(BakeOptions())
    assert session.editor.staged is None
    assert np.array_equal(logits(session), steered)
    session.close()


@pytest.mark.parametrize("change", [scale(0.5), zero_out(), clamp(-1, 1)])
def test_what_follows_the_value_is_no_constant(tmp_path, change) -> None:
    session = Session.open(checkpoint(tmp_path, "gpt2"))
    session.intervene("layers.1.residual", change)
    with pytest.raises(PlanError, match="only a vector that is added to every token alike"):
        session.bake(BakeOptions())
    session.close()


def test_the_recipe_names_the_file_of_the_vector(tmp_path) -> None:
    session = Session.open(checkpoint(tmp_path, "gpt2"))
    path = tmp_path / "calm.safetensors"
    save_vectors(SteeringVectors({1: vector()}, "mean"), path)
    session.intervene("layers.1.residual", add_vector(vector(), 0.5), "calm")
    with pytest.raises(StateError, match="vector save calm"):
        session.bake(BakeOptions())
    session.intervene("layers.1.residual", add_vector(vector(), 0.5), str(path))
    session.bake(BakeOptions())
    session.apply(ApplyOptions())
    recipe = session.editor.history.recipe()
    assert recipe[-2:] == [f"vector use {path} --layer 1 --strength 0.5", "bake"]
    session.close()


def test_a_vector_below_the_precision_of_the_bias_is_refused(tmp_path) -> None:
    session = Session.open(checkpoint(tmp_path, "gpt2", mx.bfloat16))
    session.intervene("layers.1.residual", add_vector(vector(), 1e-6))
    with pytest.raises(PlanError, match="too small to be told from rounding"):
        session.bake(BakeOptions())
    session.close()


def test_steered_experts_and_vectors_are_baked_one_at_a_time() -> None:
    session = Session.open("demo")
    session.intervene("layers.1.residual", add_vector(vector(128)))
    with pytest.raises(PlanError, match="has a bias"):
        session.bake(BakeOptions())
    session.steer(SteerOptions(activate={3: (1,)}))
    with pytest.raises(StateError, match="bake writes one of both"):
        session.bake(BakeOptions())
    session.close()


def test_a_bias_of_sixteen_bits_is_rounded_as_it_is_saved(tmp_path) -> None:
    session = Session.open(checkpoint(tmp_path, "gpt2", mx.bfloat16))
    plain = logits(session)
    session.intervene("layers.1.residual", add_vector(vector()))
    steered = logits(session)
    session.bake(BakeOptions())
    assert np.abs(logits(session) - steered).max() < 0.02 * np.abs(steered - plain).max() + 1e-2
    (path,) = {path for _, _, path, _ in session.editor.staged.report.held}
    bias = session.editor.resident.tree.get(path).astype(mx.float32)
    assert np.array_equal(np.array(bias), np.array(bias.astype(mx.bfloat16).astype(mx.float32)))
    session.close()
