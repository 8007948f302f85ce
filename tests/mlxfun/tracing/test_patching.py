"""Patching against the same done by hand, one cell at a time."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from tracing_rigs import tiny

from mlxfun.errors import ModelError, UsageError
from mlxfun.tracing.interventions import add_vector, drop_expert, replace_with
from mlxfun.tracing.model import Model
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.attribution import attribution_patching, gradients
from mlxfun.tracing.patching.path import path_patching
from mlxfun.tracing.patching.study import Patching, studies
from tests.families import spread

CLEAN, CORRUPTED = [3, 14, 15, 9, 26], [3, 14, 7, 9, 26]
NO_LAYERS_CALLED = {"iquestloopcoder"}
ALL = tuple(n for n in (*tiny_models.RUNNABLE, *tiny_models.RUNNABLE_DENSE)
            if n not in NO_LAYERS_CALLED)  # fmt: skip
KL = "kl"


def run(model: Model, tokens: list[int], changes: dict | None = None) -> np.ndarray:
    with model.trace(tokens) as t:
        for name, change in (changes or {}).items():
            t.edit(name, change)
        saved = t.output.save(positions=-1)
    return np.array(saved)[0].astype(np.float64)


def kl(clean: np.ndarray, other: np.ndarray) -> float:
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (clean, other))
    return float((np.exp(p) * (p - q)).sum())


def restored(model: Model, changes: dict) -> float:
    clean, corrupted = run(model, CLEAN), run(model, CORRUPTED)
    return 1 - kl(clean, run(model, CORRUPTED, changes)) / kl(clean, corrupted)


def value(model: Model, tokens: list[int], name: str) -> mx.array:
    with model.trace(tokens) as t:
        saved = t[name].save()
    return saved.value


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    ("component", "point"),
    [("residual", "residual"), ("attn", "attn.output"), ("mlp", "mlp.output")],
)
def test_a_position_of_a_layer_is_patched_as_by_hand(name, component, point) -> None:
    model = tiny(name)
    found = activation_patching(model, CLEAN, CORRUPTED, component, KL)
    assert found.scores.shape == (model.parts.names.layers, 5)
    for layer, position in ((0, 2), (1, 4), (1, 3)):
        clean = value(model, CLEAN, f"layers.{layer}.{point}")
        change = {f"layers.{layer}.{point}": replace_with(clean, positions=position)}
        assert found.scores[layer, position] == pytest.approx(restored(model, change), abs=2e-3)
    assert np.allclose(found.scores[:, :2], 0, atol=1e-3)  # the prompts begin alike
    small = activation_patching(model, CLEAN, CORRUPTED, component, KL, Patching(batch_tokens=10))
    assert np.allclose(small.scores, found.scores, atol=1e-3)


def test_a_head_is_patched_as_by_hand() -> None:
    model = tiny("llama")
    found = activation_patching(model, CLEAN, CORRUPTED, "head", KL)
    assert found.scores.shape == (3, 4)
    for layer, head in ((0, 1), (2, 3)):
        name = f"layers.{layer}.attn.heads"
        change = {name: replace_with(value(model, CLEAN, name), heads=[head])}
        assert found.scores[layer, head] == pytest.approx(restored(model, change), abs=2e-3)


def test_an_expert_is_patched_by_what_it_adds() -> None:
    model = tiny("qwen3_moe")
    found = activation_patching(model, CLEAN, CORRUPTED, "expert", KL)
    assert found.scores.shape == (2, 8)
    for layer, expert in np.ndindex(2, 8):
        adds = []
        for tokens in (CLEAN, CORRUPTED):
            with model.trace(tokens) as t:
                one = t.layers[layer].experts[expert].output.save()
                sums = t.layers[layer].mlp.output.save()
            whole = np.zeros((5, 32))
            np.add.at(whole, one.tokens[:, 1], np.array(one))
            adds.append(whole)
        patched = np.array(sums)[0] - adds[1] + adds[0]
        change = {f"layers.{layer}.mlp.output": replace_with(patched.astype(np.float32))}
        assert found.scores[layer, expert] == pytest.approx(restored(model, change), abs=2e-3)


def test_a_route_is_patched_by_choice_and_weights() -> None:
    model = tiny("qwen3_moe")
    found = activation_patching(model, CLEAN, CORRUPTED, "route", KL)
    for layer, position in ((0, 2), (1, 4)):
        change = {
            f"layers.{layer}.router.{part}": replace_with(
                value(model, CLEAN, f"layers.{layer}.router.{part}"), positions=position
            )
            for part in ("choice", "weights")
        }
        assert found.scores[layer, position] == pytest.approx(restored(model, change), abs=2e-3)


@pytest.mark.parametrize("name", spread(ALL))
def test_the_last_position_of_the_last_layer_carries_everything(name: str) -> None:
    model = tiny(name)
    last = Patching(layers=[model.parts.names.layers - 1])
    found = activation_patching(model, CLEAN, CORRUPTED, "residual", KL, last)
    assert found.scores[0, -1] == pytest.approx(1, abs=5e-3)
    assert np.allclose(found.scores[0, :-1], 0, atol=5e-3)


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_patching_all_experts_of_a_layer_one_by_one_runs_on_every_family(name: str) -> None:
    model = tiny(name)
    layer = model.parts.map.experts.layers[-1].index
    found = activation_patching(model, CLEAN, CORRUPTED, "expert", KL, Patching(layers=[layer]))
    assert np.isfinite(found.scores).all()
    assert np.abs(found.scores).max() > 0


def test_metrics_and_answers() -> None:
    model = tiny("llama")
    clean, corrupted = run(model, CLEAN), run(model, CORRUPTED)
    one, other = 5, 9
    found = activation_patching(
        model, CLEAN, CORRUPTED, "mlp", "logit_diff", Patching((one, other))
    )
    assert found.clean == pytest.approx(clean[one] - clean[other], abs=1e-4)
    assert found.corrupted == pytest.approx(corrupted[one] - corrupted[other], abs=1e-4)
    assert (found.answer, found.other) == ("e", "i")
    found = activation_patching(model, CLEAN, CORRUPTED, "mlp", "probability", Patching(("e",)))
    assert found.clean == pytest.approx(np.exp(clean[5]) / np.exp(clean).sum(), abs=1e-4)

    def norm(logits: mx.array) -> mx.array:
        return mx.sqrt(mx.sum(logits * logits, axis=-1))

    found = activation_patching(model, CLEAN, CORRUPTED, "mlp", norm)
    assert found.metric == "norm"
    assert found.clean == pytest.approx(np.linalg.norm(clean), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 2, 3], [1, 2], "mlp"), "has 3 tokens and the corrupted one 2"),
        (([1, 2, 3], [1, 2, 3], "mlp"), "the same tokens"),
        (([[1, 2], [3, 4]], [[1, 5]], "mlp"), "make no pairs"),
        (([1, 2], [1, 3], "neuron"), "there is no component 'neuron'"),
        (([1, 2], [1, 3], "expert"), "has a component expert"),
        (([1, 2], [1, 3], "mlp", "accuracy"), "there is no metric 'accuracy'"),
        (([1, 2], [1, 3], "mlp", "logit_diff", Patching((4, 4))), "two different tokens"),
        (([1, 2], [1, 3], "mlp", "logit_diff", Patching(("ab",))), "is 2 tokens"),
        (([1, 2], [1, 3], "mlp", lambda z: z[:, 0] * 0), "nothing to restore"),
        (([1, 2], [1, 3], "mlp", "kl", Patching(layers=[9])), "decoder layer 9"),
    ],
)
def test_what_cannot_be_patched_is_refused_with_the_reason(arguments, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        activation_patching(tiny("llama"), *arguments)


def test_several_pairs_are_averaged() -> None:
    model = tiny("llama")
    pairs = [(CLEAN, CORRUPTED), ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5])]
    both = activation_patching(model, [a for a, _ in pairs], [b for _, b in pairs], "attn", KL)
    each = [activation_patching(model, a, b, "attn", KL).scores for a, b in pairs]
    assert np.allclose(both.scores, np.mean(each, axis=0), atol=1e-3)
    assert both.pairs == 2


def test_a_result_tells_itself_as_text_data_and_picture() -> None:
    model = tiny("qwen3_moe")
    found = activation_patching(model, CLEAN, CORRUPTED, "residual", KL)
    best = found.top_components(3)
    assert [abs(c.score) for c in best] == sorted((abs(c.score) for c in best), reverse=True)
    assert best[0].score == pytest.approx(np.abs(found.scores).max())
    assert "activation patching of residual" in found.summary()
    data = json.loads(found.to_json())
    assert np.allclose(np.array(data["scores"], float), found.scores)
    assert found.to_markdown(3).count("\n| ") == 4
    root = ET.fromstring(found.plot())
    cells = [e for e in root.iter() if e.tag.endswith("title")]
    assert len(cells) == found.scores.size


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("llama", None), ("qwen3_moe", None), ("deepseek_v3", None),
                                            ("qwen3_moe", "affine4"), ("gpt_oss", "mxfp4")])  # fmt: skip
def test_gradients_are_those_of_finite_differences_on_packed_models_too(name, mode) -> None:
    model = tiny(name, mode)
    points = ("layers.0.residual", "layers.1.mlp.output", "layers.0.attn.output")
    study = studies(model.parts, (CLEAN, CORRUPTED), "residual", "logit_diff", Patching((5, 9)))[0]
    places = [model.parts.names.point(n) for n in points]
    width = model.parts.map.hidden_size
    found = gradients(study, places, [(1, 5, width)] * 3)
    rng = np.random.default_rng(0)
    for place, slope in zip(places, found, strict=True):
        way = rng.normal(size=(1, 5, width)).astype(np.float32)
        ends = [run(model, CORRUPTED, {place.name: add_vector(way, s)}) for s in (2e-3, -2e-3)]
        numeric = ((ends[0][5] - ends[0][9]) - (ends[1][5] - ends[1][9])) / 4e-3
        assert float((np.array(slope) * way).sum()) == pytest.approx(numeric, rel=0.05, abs=0.05)


@pytest.mark.parametrize("component", ["residual", "attn", "mlp", "head", "expert", "route"])
def test_attribution_estimates_small_patches(component) -> None:
    """Where clean and corrupted runs differ little, the estimate is the patch."""
    model = tiny("qwen3_moe")
    module = model.parts.model
    rows = module.model.embed_tokens.weight
    nearby = rows[15] + 0.01 * rows[7]
    module.model.embed_tokens.weight = mx.concatenate([rows[:7], nearby[None], rows[8:]])
    how = ("logit_diff", Patching((5, 9)))
    patched = activation_patching(model, CLEAN, CORRUPTED, component, *how)
    estimated = attribution_patching(model, CLEAN, CORRUPTED, component, *how)
    assert estimated.scores.shape == patched.scores.shape
    assert np.allclose(estimated.scores, patched.scores, atol=0.05)
    assert np.abs(patched.scores).max() > 0.1


@pytest.mark.parametrize("name", spread(ALL))
def test_gradients_go_through_every_family(name: str) -> None:
    model = tiny(name)
    last = Patching((5, 9), [model.parts.names.layers - 1])
    found = attribution_patching(model, CLEAN, CORRUPTED, "residual", "logit_diff", last)
    # Behind the last layer only norm and head are left: the other positions have no part.
    assert np.allclose(found.scores[0, :-1], 0, atol=1e-4)
    assert np.isfinite(found.scores).all()
    assert found.scores[0, -1] != 0


# -- paths ----------------------------------------------------------------------------------------


def test_a_path_from_the_last_part_to_the_output_is_the_patch_itself() -> None:
    model = tiny("qwen3_moe")
    last = Patching(layers=[1])
    for sender in ("mlp", "expert"):
        direct = path_patching(model, (CLEAN, CORRUPTED), sender, "output", KL, last)
        whole = activation_patching(model, CLEAN, CORRUPTED, sender, KL, last)
        assert np.allclose(direct.scores, whole.scores, atol=1e-3)
    assert "into output" in direct.summary()


@pytest.mark.parametrize("receiver", ["layers.2.attn.queries", "layers.2.mlp.input", "output"])
def test_a_path_is_patched_as_by_hand(receiver: str) -> None:
    model = tiny("llama")
    found = path_patching(model, (CLEAN, CORRUPTED), "head", receiver, KL)
    parts = [f"layers.{i}.{p}.output" for i in range(3) for p in ("attn", "mlp")]
    held = {name: value(model, CORRUPTED, name) for name in parts}
    for layer, head in ((0, 1), (1, 2)):
        name = f"layers.{layer}.attn.heads"
        with model.trace(CORRUPTED) as t:
            for part, kept in held.items():
                if part != f"layers.{layer}.attn.output" and not (
                    receiver != "output" and part.startswith(receiver.rpartition(".")[0])
                ):
                    t.edit(part, replace_with(kept))
            t.edit(name, replace_with(value_inside(model, name), heads=[head]))
            seen = t[receiver].save()
        if receiver == "output":
            clean = run(model, CLEAN)
            score = 1 - kl(clean, np.array(seen)[0, -1].astype(float)) / kl(
                clean, run(model, CORRUPTED)
            )
        else:
            score = restored(model, {receiver: replace_with(seen.value)})
        assert found.scores[layer, head] == pytest.approx(score, abs=2e-3)


def value_inside(model: Model, name: str) -> mx.array:
    """A clean value, taken while another trace is being written."""
    return value(model, CLEAN, name)


def test_paths_that_cannot_be_held_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="sends by no path"):
        path_patching(tiny("llama"), (CLEAN, CORRUPTED), "residual")
    with pytest.raises(UsageError, match="is no receiver"):
        path_patching(tiny("qwen3_moe"), (CLEAN, CORRUPTED), "mlp", "layers.1.router.logits")
    with pytest.raises(ModelError, match="beside their attention"):
        path_patching(tiny("gemma4_text"), (CLEAN, CORRUPTED), "mlp")


# -- together -------------------------------------------------------------------------------------


def test_patching_an_expert_moves_the_answer_as_ablating_it_does() -> None:
    """Put into the corrupted run, what an expert adds moves the answer towards the clean run's; taken
    out of the clean run, it moves the answer away."""
    model = Model.open("demo")
    texts = ("What is 2 + 3? The answer is", "What is 2 + 3? The reason is")
    rows = [model.parts.tokenizer.encode(text) for text in texts]
    ends = [run(model, ids) for ids in rows]
    answer, other = (int(np.argmax(z)) for z in ends)
    how = ("logit_diff", Patching((answer, other)))
    found = activation_patching(model, *rows, "expert", *how)
    with model.trace(rows[0]) as t:
        routes = t["layers.*.router.choice"].save()
    serves = np.array([np.isin(np.arange(16), np.array(one)) for one in routes])
    moved = np.where(serves, found.scores, 0) * (found.clean - found.corrupted)
    layer, expert = divmod(int(np.argmax(moved)), 16)
    z = run(model, rows[0], {f"layers.{layer}.experts": drop_expert(expert)})
    ablated = (z[answer] - z[other]) - (ends[0][answer] - ends[0][other])
    assert moved[layer, expert] > 0.5
    assert ablated < -0.5
    estimated = attribution_patching(model, *rows, "expert", *how)
    assert np.corrcoef(estimated.scores.reshape(-1), found.scores.reshape(-1))[0, 1] > 0.5
