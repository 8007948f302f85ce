"""The first examples of libraries of this kind, with the names of this one."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun import Model, tracing
from mlxfun.tracing import (
    Lens,
    Patching,
    activation_patching,
    add_vector,
    attention_patterns,
    attribution_patching,
    clamp,
    compose,
    direct_logit_attribution,
    drop_expert,
    find_heads,
    force_route,
    get_activations,
    logit_lens,
    make_vectors,
    noise,
    path_patching,
    replace_with,
    residual_norms,
    run_prompts,
    scale,
    train_probe,
    zero_out,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.open("demo")


def test_trace(model: Model) -> None:
    with model.trace("The capital of France is"):
        attention = model.layers[3].attn.output.save()
        experts = model.layers[3].experts[1].output.save()
        logits = model.output.save()
    assert attention.shape == (1, 8, 128)
    assert len(experts.tokens) == len(experts.weights) == len(experts.value)
    assert model.parts.tokenizer.decode([int(logits[0, -1].argmax().item())])


def test_intervene(model: Model) -> None:
    plain = model.generate("The capital of France is", 8)
    for change in (zero_out(), scale(0.5), add_vector(np.ones(128)), replace_with(1.0), clamp(-1, 1),
                   noise(0.5), compose(scale(2.0), clamp(-1, 1))):  # fmt: skip
        told = model.generate("The capital of France is", 8, {"layers.2.mlp.output": change})
        assert len(told.tokens) == 8
    assert model.generate("The capital of France is", 8) == plain
    experts = {"layers.2.experts": drop_expert(11), "layers.3.router": force_route([7, 2])}
    assert model.generate("The capital of France is", 8, experts).tokens != plain.tokens


def test_patch(model: Model) -> None:
    clean, corrupted = "What is 2 + 3? The answer is", "What is 2 + 3? The reason is"
    result = activation_patching(model, clean, corrupted, component="mlp", metric="logit_diff")
    assert len(result.top_components(5)) == 5
    assert result.summary()
    assert result.to_json()
    assert result.to_markdown()
    assert result.plot().startswith("<svg")
    estimated = attribution_patching(model, clean, corrupted, "mlp")
    assert estimated.scores.shape == result.scores.shape
    direct = path_patching(model, (clean, corrupted), "head", "output", "kl", Patching(layers=[5]))
    assert direct.scores.shape == (1, 4)


def test_read(model: Model) -> None:
    text = "The capital of France is"
    assert logit_lens(model, text, Lens(layers=[0, 5])).ids.shape == (2, 8, 5)
    assert direct_logit_attribution(model, text).top_components(3)
    assert attention_patterns(model, text, [5]).weights[5].shape == (4, 8, 8)
    assert find_heads(model, "previous token", length=8, samples=1)
    assert residual_norms(model, text).shape == (7, 8)
    assert run_prompts(model, [text, "def add(a, b):"], 3)[1].tokens


def test_steer_and_probe(model: Model) -> None:
    code = ["def f(x):", "import os", "class A:", "return x + 1"]
    prose = ["the old man", "a dose of", "she went to", "once upon a"]
    found = get_activations(model, code + prose, [2], positions=-1)
    assert found[2].shape == (8, 128)
    probe = train_probe(np.array(found[2]), ["code"] * 4 + ["prose"] * 4)
    assert probe.classes == ("code", "prose")
    rows = [[model.parts.tokenizer.encode(text) for text in side] for side in (code, prose)]
    made = make_vectors(model, (rows[0], rows[1]), layers=[2])
    steered = model.generate("the", 8, {"layers.2.residual": add_vector(made.layers[2], 2.0)})
    assert steered.tokens != model.generate("the", 8).tokens


def test_every_name_of_the_package_is_there() -> None:
    for name in tracing.__all__:
        assert callable(getattr(tracing, name))
    with pytest.raises(AttributeError):
        _ = tracing.nothing
