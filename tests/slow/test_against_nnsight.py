"""Logits, activations, interventions and patching agree with nnsight's on the same weights.

The models are made by transformers, run there by PyTorch under nnsight, and opened here by mlx-lm. Needs
`pip install -e '.[compare]'`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxfun
from mlxfun import Model
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.study import Patching

nnsight = pytest.importorskip("nnsight")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLEAN, CORRUPTED = [5, 9, 17, 33, 60], [5, 9, 21, 33, 60]
SIZES = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def written(model: Any, path: Path) -> None:
    """Saved as transformers does, with the keys that mlx-lm reads, and the demo's tokenizer."""
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(mlxfun.__file__).parent / "data" / "demo" / "model" / name, path / name)


@pytest.fixture(scope="module", params=["dense", "experts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Model]:
    """The same weights in both libraries."""
    torch.manual_seed(0)
    if request.param == "dense":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)
        model = transformers.Qwen3MoeForCausalLM(config)
    model = model.float().eval()
    path = tmp_path_factory.mktemp("model") / request.param
    written(model, path)
    return nnsight.NNsight(model), Model.open(str(path))


def plain(value: Any) -> np.ndarray:
    return (value[0] if isinstance(value, tuple) else value).detach().numpy()


def test_logits_and_activations_are_the_same(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    layers = theirs.model.layers
    with torch.no_grad(), theirs.trace(torch.tensor([CLEAN])):
        query = layers[1].self_attn.q_proj.output.save()
        attention = layers[1].self_attn.output[0].save()
        feed_forward = layers[1].mlp.output.save()
        residual = layers[1].output.save()
        logits = theirs.output.logits.save()
    with ours.trace(CLEAN) as t:
        one = ours.layers[1]
        mine = [one.attn.q.save(), one.attn.output.save(), one.mlp.output.save(),
                one.residual.save(), ours.output.save()]  # fmt: skip
    assert t.tokens[0] == CLEAN
    expected = (query, attention, feed_forward, residual, logits)
    for saved, wanted in zip(mine, expected, strict=True):
        np.testing.assert_allclose(np.array(saved.value), plain(wanted), **CLOSE)


def test_an_intervention_changes_the_same(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    with torch.no_grad(), theirs.trace(torch.tensor([CLEAN])):
        theirs.model.layers[1].mlp.output[:] = 0
        logits = theirs.output.logits.save()
    with ours.trace(CLEAN):
        ours.layers[1].mlp.output = 0.0
        mine = ours.output.save()
    np.testing.assert_allclose(np.array(mine.value), plain(logits), **CLOSE)


def logit_difference(logits: Any, answer: int, other: int) -> float:
    last = plain(logits)[0, -1]
    return float(last[answer] - last[other])


def test_activation_patching_gives_the_same_scores(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    layers, count = theirs.model.layers, SIZES["num_hidden_layers"]
    clean: list[Any] = []
    with torch.no_grad(), theirs.trace(torch.tensor([CLEAN])):
        clean += [layers[number].output.save() for number in range(count)]
        clean_logits = theirs.output.logits.save()
    with torch.no_grad(), theirs.trace(torch.tensor([CORRUPTED])):
        corrupted_logits = theirs.output.logits.save()
    answer, other = (int(plain(x)[0, -1].argmax()) for x in (clean_logits, corrupted_logits))
    if answer == other:
        other = int(plain(clean_logits)[0, -1].argsort()[-2])
    ends = [logit_difference(x, answer, other) for x in (clean_logits, corrupted_logits)]
    scores = np.zeros((count, len(CLEAN)))
    for layer in range(count):
        for position in range(len(CLEAN)):
            with torch.no_grad(), theirs.trace(torch.tensor([CORRUPTED])):
                layers[layer].output[:, position] = plain_tensor(clean[layer])[:, position]
                logits = theirs.output.logits.save()
            scores[layer, position] = logit_difference(logits, answer, other)
    scores = (scores - ends[1]) / (ends[0] - ends[1])
    how = Patching((f"#{answer}", f"#{other}"))
    found = activation_patching(ours, CLEAN, CORRUPTED, "residual", "logit_diff", how)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-3)


def plain_tensor(value: Any) -> Any:
    return (value[0] if isinstance(value, tuple) else value).detach()
