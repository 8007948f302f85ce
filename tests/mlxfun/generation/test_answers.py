"""Greedy answers in batches are those that each prompt gets alone, in every family."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from rigs import StopAt

from mlxfun.errors import Cancelled
from mlxfun.generation import answers
from mlxfun.generation.answers import Greedy, takes_ragged_batches
from tests.families import spread

LENGTHS = (3, 9, 4, 17, 9, 1)
PROMPTS = [np.random.default_rng(n).integers(3, 40, length) for n, length in enumerate(LENGTHS)]


class Words:
    """A tokenizer of numbers that ends answers at `stop`."""

    def __init__(self, *stop: int) -> None:
        self.eos_token_ids = set(stop)

    def decode(self, tokens) -> str:
        return " ".join(map(str, tokens))


def alone(model, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy tokens by stock forwards of one prompt."""
    cache, found = make_prompt_cache(model), []
    tokens = mx.array(prompt[None])
    for _ in range(count):
        tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
        found.append(int(tokens.item()))
    return found


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_each_answer_is_that_of_the_prompt_alone(rig, name, monkeypatch) -> None:
    monkeypatch.setattr(answers, "CPU_ROWS", 4)
    model = rig(name).model
    found = Greedy(model, Words())(PROMPTS, 7)
    assert [list(a.tokens) for a in found] == [alone(model, p, 7) for p in PROMPTS]


def test_attention_models_are_decoded_in_ragged_batches(rig) -> None:
    ragged = {n for n in tiny_models.RUNNABLE if takes_ragged_batches(rig(n).model)}
    assert {"qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss"} <= ragged
    assert not {"lfm2_moe", "nemotron_h"} & ragged


def test_an_answer_ends_at_a_stop_token_and_makes_room(rig, monkeypatch) -> None:
    monkeypatch.setattr(answers, "CPU_ROWS", 2)
    monkeypatch.setattr(answers, "PREFILL_ROWS", 1)
    model = rig("qwen3_moe").model
    whole = [alone(model, p, 12) for p in PROMPTS]
    stop = whole[0][3]
    cut = [w[: w.index(stop) + 1] if stop in w else w for w in whole]
    found = Greedy(model, Words(stop))(PROMPTS, 12)
    assert [list(a.tokens) for a in found] == cut
    assert [a.text for a in found] == [" ".join(str(t) for t in c if t != stop) for c in cut]


def test_a_cancel_between_steps_ends_it(rig) -> None:
    model = rig("qwen3_moe").model
    with pytest.raises(Cancelled):
        Greedy(model, Words())(PROMPTS, 50, StopAt(3))
    assert [list(a.tokens) for a in Greedy(model, Words())(PROMPTS[:1], 3)] == [
        alone(model, PROMPTS[0], 3)
    ]
