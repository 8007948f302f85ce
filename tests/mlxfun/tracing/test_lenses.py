"""Lenses, attribution, attention patterns, norms and probes, against the same written out."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from tracing_rigs import tiny

from mlxfun import Model
from mlxfun.errors import ModelError, UsageError
from mlxfun.tracing.interventions import zero_out
from mlxfun.tracing.lenses.direct import direct_logit_attribution
from mlxfun.tracing.lenses.logit_lens import Lens, logit_lens
from mlxfun.tracing.lenses.patterns import (
    THUMBNAIL,
    attention_patterns,
    figures,
    find_heads,
    residual_norms,
    thumbnail,
    tiled,
)
from mlxfun.tracing.lenses.probe import train_probe
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.study import Patching
from tests.families import spread

PROMPT = [3, 14, 15, 9, 26]
ALL = tuple(n for n in (*tiny_models.RUNNABLE, *tiny_models.RUNNABLE_DENSE)
            if n != "iquestloopcoder")  # fmt: skip
MANY_STREAMS = {"deepseek_v41", "gemma3n", "nanochat", "talkie"}
"""Several residual streams, or no module for the final norm."""
OTHER_NORMS = {"nemotron"}


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.open("demo")


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_stream_that_is_not_all_there_is_is_not_read() -> None:
    with pytest.raises(ModelError, match="hand on more than the residual stream"):
        logit_lens(tiny("deepseek_v41"), PROMPT)


@pytest.mark.parametrize("name", spread(n for n in ALL if n != "deepseek_v41"))
def test_the_lens_of_the_last_layer_is_what_the_model_says(name: str) -> None:
    model = tiny(name)
    found = logit_lens(model, PROMPT, Lens(top_k=3))
    plain = softmax(np.array(model.parts.model(mx.array([PROMPT])))[0].astype(np.float64))
    assert np.allclose(found.probabilities[-1], np.sort(plain)[:, ::-1][:, :3], atol=1e-4)
    assert found.ids.shape == (model.parts.names.layers, 5, 3)
    assert (found.probabilities[..., :-1] >= found.probabilities[..., 1:]).all()


@pytest.mark.parametrize("chunk_bytes", [1, 64 * 4 * 2, 1 << 20])
def test_a_lens_is_norm_and_head_of_each_layer_in_chunks_of_any_size(chunk_bytes: int) -> None:
    model = tiny("llama")
    module = model.parts.model
    found = logit_lens(model, PROMPT, Lens(answers=(7, "e"), chunk_bytes=chunk_bytes))
    with model.trace(PROMPT) as t:
        streams = [t.layers[i].residual.save() for i in range(3)]
    for layer, stream in enumerate(streams):
        x = np.array(stream)[0].astype(np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * np.array(module.model.norm.weight)
        p = softmax(x @ np.array(module.lm_head.weight).T)
        assert (found.ids[layer] == np.argsort(-p, axis=-1)[:, :5]).all()
        assert np.allclose(found.entropy[layer], -(p * np.log(p)).sum(-1), atol=1e-4)
        for number, token in enumerate((7, 5)):
            assert np.allclose(found.answer_probabilities[layer, :, number], p[:, token], atol=1e-5)
            ranks = (p > p[:, token : token + 1]).sum(-1) + 1
            assert (found.answer_ranks[layer, :, number] == ranks).all()


def test_layers_and_positions_are_chosen(demo: Model) -> None:
    found = logit_lens(demo, "The capital of France is", Lens(layers=[-1, 2], positions=[-1, 0]))
    whole = logit_lens(demo, "The capital of France is")
    assert found.layers == (5, 2)
    assert found.positions == (7, 0)
    assert (found.ids[0] == whole.ids[5][[7, 0]]).all()
    with pytest.raises(UsageError, match="no decoder layer 9"):
        logit_lens(demo, "a", Lens(layers=[9]))


def test_the_layer_from_which_on_the_answer_stands(demo: Model) -> None:
    found = logit_lens(demo, "def add(a, b):\n    return", Lens(answers=(" a",)))
    first = found.first_layer()
    assert first is not None
    index = found.layers.index(first)
    answer = found.model_ids[-1]
    assert (found.ids[index:, -1, 0] == answer).all()
    assert index == 0 or found.ids[index - 1, -1, 0] != answer
    assert f"from layer {first} on" in found.summary()
    assert json.loads(found.to_json())["layers"] == list(range(6))
    assert found.to_markdown().count("\n") == 6 + 4
    ET.fromstring(found.plot())


# -- direct logit attribution ---------------------------------------------------------------------


@pytest.mark.parametrize("name", spread(n for n in ALL if n not in MANY_STREAMS | OTHER_NORMS))
def test_the_shares_of_all_parts_sum_to_the_logit(name: str) -> None:
    found = direct_logit_attribution(tiny(name), PROMPT, 3, 5)
    logits = np.array(tiny(name).parts.model(mx.array([PROMPT])))[0, -1]
    assert found.total == pytest.approx(float(logits[3] - logits[5]), abs=1e-4)
    assert abs(found.unexplained) < 2e-3 * max(1, sum(abs(s.logit) for s in found.shares))


@pytest.mark.parametrize("name", sorted(MANY_STREAMS | OTHER_NORMS))
def test_a_logit_that_is_no_sum_is_not_shared_out(name: str) -> None:
    with pytest.raises(ModelError, match=r"streams|no norm whose scale"):
        direct_logit_attribution(tiny(name), PROMPT, 3, 5)


def test_a_share_is_the_parts_vector_times_norm_and_head() -> None:
    model = tiny("qwen3_moe")
    module = model.parts.model
    found = direct_logit_attribution(model, PROMPT, 3, 5)
    with model.trace(PROMPT) as t:
        last = t.layers[1].residual.save(positions=-1)
        attention = t.layers[0].attn.output.save(positions=-1)
        experts = [t.layers[1].experts[e].output.save(positions=-1) for e in range(8)]
    x = np.array(last)[0].astype(np.float64)
    head = np.array(module.lm_head.weight)
    way = (head[3] - head[5]) * np.array(module.model.norm.weight) / np.sqrt((x * x).mean() + 1e-5)
    shares = {(s.kind, s.layer, s.number): s.logit for s in found.shares}
    assert shares["attn", 0, None] == pytest.approx(float(np.array(attention)[0] @ way), abs=1e-4)
    for number, one in enumerate(experts):
        if len(one.tokens):
            expected = float(np.array(one)[0] @ way)
            assert shares["expert", 1, number] == pytest.approx(expected, abs=1e-4)
    heads = sum(v for (kind, layer, _), v in shares.items() if (kind, layer) == ("head", 0))
    assert heads == pytest.approx(shares["attn", 0, None], abs=1e-4)
    served = {number for kind, layer, number in shares if (kind, layer) == ("expert", 1)}
    assert served == {n for n, one in enumerate(experts) if len(one.tokens)}


def test_packed_models_are_attributed_as_well() -> None:
    for name, mode in (("qwen3_moe", "affine4"), ("gpt_oss", "mxfp4")):
        found = direct_logit_attribution(tiny(name, mode), PROMPT, 3, 5)
        assert abs(found.unexplained) < 5e-3 * max(1, sum(abs(s.logit) for s in found.shares))
        assert any(s.kind == "expert" for s in found.shares)
        assert json.loads(found.to_json())["total"] == found.total
        assert "| part | logit |" in found.to_markdown()


# -- attention, norms -----------------------------------------------------------------------------


def test_patterns_are_the_weights_of_the_heads(demo: Model) -> None:
    found = attention_patterns(demo, "The capital of France is", [2, 4])
    with demo.trace("The capital of France is") as t:
        saved = t.layers[4].attn.weights.save()
    assert np.array_equal(found.weights[4], np.array(saved)[0])
    best = found.strongest(4, 1)
    assert best[0][2] == pytest.approx(found.weights[4][1, -1].max())
    root = ET.fromstring(found.plot(4, 1))
    assert sum(e.tag.endswith("title") for e in root.iter()) == 64
    assert found.to_markdown(4, 1).startswith("Layer 4, head 1.")
    with pytest.raises(UsageError, match="no attention"):
        attention_patterns(tiny("mamba2"), PROMPT, [0])


def test_induction_heads_are_found_by_their_patterns_and_confirmed_by_patching(demo: Model) -> None:
    """In a text of random tokens that comes twice, the second copy can only be foretold by looking
    back. The head that looks there is found by its weights; taking it away costs the most, and
    putting it into a run without the earlier copy brings the most back."""
    best = find_heads(demo, "induction")
    assert best[0].score > 2 * best[2].score > 0
    chosen = best[0]
    rng = np.random.default_rng(5)
    gains, losses = [], []
    for _ in range(6):
        text = rng.integers(100, 4000, 16).tolist()
        clean, corrupted = text + text[:12], rng.integers(100, 4000, 16).tolist() + text[:12]
        answer = text[12]
        how = Patching((answer,))

        def log_p(z: mx.array, answer: int = answer) -> mx.array:
            return z[:, answer] - mx.logsumexp(z, axis=-1)

        found = activation_patching(demo, clean, corrupted, "head", log_p, how)
        gains.append(found.scores * (found.clean - found.corrupted))
        with demo.trace(clean) as t:
            plain = t.output.save(positions=-1)
        with demo.trace(clean) as t:
            t.layers[chosen.layer].attn.heads = zero_out(heads=[chosen.head])
            without = t.output.save(positions=-1)
        losses.append(float((log_p(plain.value) - log_p(without.value)).item()))
    mean = np.mean(gains, axis=0)
    assert (chosen.layer, chosen.head) == divmod(int(np.argmax(mean)), mean.shape[1])
    assert mean[chosen.layer, chosen.head] > 0.3
    assert np.mean(losses) > 0.3


def test_norms_of_the_stream_are_those_of_its_vectors() -> None:
    model = tiny("llama")
    found = residual_norms(model, PROMPT)
    with model.trace(PROMPT) as t:
        first, last = t.layers[0].input.save(), t.layers[2].residual.save()
    assert found.shape == (4, 5)
    assert np.allclose(found[0], np.linalg.norm(np.array(first)[0], axis=-1), rtol=1e-5)
    assert np.allclose(found[3], np.linalg.norm(np.array(last)[0], axis=-1), rtol=1e-5)
    assert residual_norms(tiny("gemma3n"), PROMPT).shape == (5, 5)


# -- probes ---------------------------------------------------------------------------------------


def test_a_probe_reads_what_is_there_and_nothing_that_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = ["even" if i % 2 == 0 else "odd" for i in range(120)]
    x = rng.normal(size=(120, 16)).astype(np.float32) * np.linspace(0.1, 50, 16)
    noise = train_probe(x, labels)
    assert 0.2 < noise.accuracy < 0.8
    x[:, 3] += np.where(np.arange(120) % 2 == 0, 60.0, -60.0)
    found = train_probe(x, labels)
    assert found.accuracy == found.balanced == 1.0
    assert found.baseline == pytest.approx(0.5)
    assert (found.trained, found.held_out) == (90, 30)
    assert found.predict(x[:4]) == labels[:4]
    assert "100.0% right on 30 held-out" in found.summary()


def test_a_probe_of_several_classes_on_a_models_activations(demo: Model) -> None:
    from mlxfun.tracing.activations import get_activations

    texts = [f"{word} {i}" for i in range(12) for word in ("def f", "the cat", "contract C")]
    labels = [word for _ in range(12) for word in ("code", "text", "solidity")]
    x = np.array(get_activations(demo, texts, [2])[2])
    found = train_probe(x, labels)
    assert found.classes == ("code", "solidity", "text")
    assert found.accuracy > 0.9


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["a"] * 4, "only"), (["a", "a", "a", "b"], "has one sample"), (["a", "b"], "do not go with")],
)
def test_a_probe_without_enough_to_learn_from_says_so(labels: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        train_probe(np.zeros((4, 2)), labels)


def test_a_small_map_holds_all_of_a_heads_weight_and_figures_are_means(demo: Model) -> None:
    words = " ".join(["The capital of France is"] * 5)
    found = attention_patterns(demo, words, [1])
    weights = found.weights[1][0].astype(np.float64)
    cells = thumbnail(weights)
    assert cells.shape == (THUMBNAIL, THUMBNAIL)
    np.testing.assert_allclose(cells.sum(axis=1), 1.0, rtol=1e-5)
    assert not np.triu(cells, 1).any()  # nobody looks ahead
    first, before, own, tokens = figures(weights)
    count = len(weights)
    assert first == pytest.approx(np.mean([weights[t, 0] for t in range(1, count)]))
    assert before == pytest.approx(np.mean([weights[t, t - 1] for t in range(1, count)]))
    assert own == pytest.approx(np.mean([weights[t, t] for t in range(count)]))
    assert 1.0 <= tokens <= count
    assert thumbnail(weights[:1, :1]).shape == (1, 1)
    assert figures(np.ones((1, 1)))[:3] == (0.0, 0.0, 1.0)
    sheet = tiled([thumbnail(head) for head in found.weights[1]], 1).scores
    assert np.isnan(sheet).any()
    assert np.nanmax(sheet) <= 1.0 + 1e-6
