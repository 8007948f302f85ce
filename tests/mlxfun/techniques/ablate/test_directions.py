"""Directions of the residual stream: one padded pass gives what a slow loop gives."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.data.datasets import Line, batches
from mlxfun.errors import PlanError, UsageError
from mlxfun.generation.answers import ask
from mlxfun.hooks.replay import intercepting
from mlxfun.techniques.ablate.directions import (
    Directions,
    candidates,
    difference,
    residual_means,
    strongest,
)

SEQUENCES = [
    np.array([(7 * i + i * i) % 61 for i in range(n)], np.int32) for n in (5, 19, 12, 7, 12)
]


def slow_means(r, layers) -> np.ndarray:
    """One unpadded prompt at a time, in float64: [last or mean, L, D]."""
    total = 0.0
    for sequence in SEQUENCES:
        seen = []

        def watch(_, own, args, kwargs, seen=seen):
            out = own(*args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            seen.append(np.array(hidden, np.float64)[0])
            return out

        with intercepting(layers, watch):
            mx.eval(r.model(mx.array(sequence[None])))
        rows = [h.mean(axis=1) if h.ndim == 3 else h for h in seen]  # several streams
        total = total + np.stack([[h[-1] for h in rows], [h.mean(axis=0) for h in rows]])
    return total / len(SEQUENCES)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v3", "qwen3_next", "gemma4_text", "kimi_k3", "deepseek_v41"]
)
def test_one_padded_pass_is_the_mean_over_prompts(rig, name):
    r = rig(name)
    modules = r.resident.tree.modules
    layers = [modules[layer.path] for layer in r.map.layers]
    means = residual_means(r.model, r.anatomy, layers, batches(SEQUENCES, 64, 4))
    assert means.shape[:2] == (2, r.anatomy.decoder_layers)
    np.testing.assert_allclose(means, slow_means(r, layers), rtol=2e-4, atol=2e-5)


def test_layers_are_ranked_before_normalising_and_the_last_fifth_is_left_out():
    vectors = np.zeros((2, 10, 3))
    vectors[0, :, 0] = [1, 2, 7, 3, 5, 1, 1, 1, 50, 90]
    vectors[1, :, 1] = 1.0
    found = difference(vectors, np.zeros_like(vectors))
    assert candidates("auto", 10) == tuple(range(8))
    assert strongest(found, "last", candidates("auto", 10)) == 2
    assert strongest(found, "last", candidates("all", 10)) == 9
    assert strongest(found, "last", candidates("3-5", 10)) == 4
    assert candidates("5", 10) == (5,)
    assert candidates("auto", 8) == tuple(range(6))
    assert found.norms("last")[2] == 7.0
    np.testing.assert_array_equal(found.unit("last", 2), [1.0, 0.0, 0.0])


def test_sets_that_do_not_differ_give_no_direction():
    found = Directions({"last": np.zeros((2, 3)), "mean": np.zeros((2, 3))})
    with pytest.raises(PlanError, match="do not differ behind decoder layer 1"):
        found.unit("last", 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("2-9", r"the decoder layers of this model are 0\.\.7"),
        ("x", "'x' is no range of layers"),
        ("3-1", "ends before it begins"),
    ],
)
def test_layers_that_are_not_there_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        candidates(spec, 8)


class Spelling:
    """A tokenizer of characters whose template opens a thinking block unless told not to."""

    has_chat_template = True
    think_start, think_end = "<think>", "</think>"

    def __init__(self, obeys: bool) -> None:
        self.obeys = obeys

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, *, add_generation_prompt, enable_thinking=True):
        text = "".join(f"{m['role']}:{m['content']};" for m in messages)
        block = "<think>" if enable_thinking or not self.obeys else "<think></think>"
        return self.encode(text + ("bot:" + block if add_generation_prompt else ""))


@pytest.mark.parametrize(
    ("obeys", "asked"),
    [
        (True, "user:Hi;bot:<think></think>"),
        (False, "user:Hi;bot:<think>\n</think>\n\n"),
    ],
)
def test_a_question_ends_where_the_answer_begins_behind_any_thinking(obeys, asked):
    line = Line("prompt", ("Hi", "Hello."), "here")
    tokens = ask(line, Spelling(obeys))
    assert Spelling(obeys).decode(tokens.tolist()) == asked


def test_a_plain_text_is_asked_as_a_question_and_later_turns_are_left_out():
    spelling = Spelling(True)
    assert spelling.decode(ask(Line("text", "Hi", "here"), spelling).tolist()).startswith("user:Hi")
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "a"},
             {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})  # fmt: skip
    asked = spelling.decode(ask(Line("messages", turns, "here"), spelling).tolist())
    assert asked == "system:s;user:a;bot:<think></think>"


def test_without_a_template_the_text_itself_is_run():
    plain = SimpleNamespace(has_chat_template=False, encode=lambda text: [ord(c) for c in text])
    assert ask(Line("text", "Hi", "here"), plain).tolist() == [72, 105]
