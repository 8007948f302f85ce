"""Per-sample routing equals one sample at a time, in every router family, in one pass."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun.checkpoint.load import load
from mlxfun.context import Context
from mlxfun.data.datasets import Line
from mlxfun.errors import Cancelled, DatasetError
from mlxfun.model.device.batch_size import batch_size
from mlxfun.scans import sample_routing
from mlxfun.scans.sample_routing import Sample
from tests.families import spread

SAMPLES = [
    Sample(np.array([(3 * i + 7 * n + i * i) % 61 for i in range(length)], dtype=np.int32), answer)
    for n, (length, answer) in enumerate(((5, None), (17, 9), (9, 2), (30, None), (2, 1), (12, 0)))
]


def reference(r):
    """One sample, one token, one place at a time: (frequency, gate) [S, L, E], answers [L, E]."""
    shape = (len(SAMPLES), len(r.anatomy.layers), r.anatomy.num_experts)
    freq, gate, answers = np.zeros(shape), np.zeros(shape), np.zeros(shape[1:])
    for s, sample in enumerate(SAMPLES):
        with r.taps.recording() as recording:
            mx.eval(r.model(mx.array(sample.tokens[None])))
            records = recording.drain()
        n = len(sample.tokens)
        for row, layer in enumerate(r.anatomy.layers):
            (record,) = records[row]
            mx.eval(record.arrays())
            index = np.array(record.indices).reshape(n, -1)
            weight = np.array(record.weights.astype(mx.float32)).reshape(n, -1)
            for t in range(n):
                for e, w in zip(index[t], weight[t], strict=True):
                    if layer.router_rows > layer.num_experts and w == 0:
                        continue
                    freq[s, row, e] += 1 / n
                    gate[s, row, e] += float(w) / n
                    if sample.answer is not None and t >= sample.answer:
                        answers[row, e] += 1
    return freq, gate, answers


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_a_scan_equals_one_sample_at_a_time(rig, name):
    r = rig(name)
    freq, gate, answers = reference(r)
    found = sample_routing.scan(r.model, r.taps, SAMPLES)
    np.testing.assert_allclose(found.frequency, freq, atol=1e-12)
    np.testing.assert_allclose(found.gate, gate, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(found.answer_counts, answers)
    assert found.tokens.tolist() == [5, 17, 9, 30, 2, 12]
    assert found.answer_tokens == 8 + 7 + 1 + 12


def test_one_pass_and_at_most_one_wait_a_layer_per_batch(rig, monkeypatch):
    r = rig("qwen3_moe")
    real, calls = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *a: (calls.append(1), real(*a)))
    sample_routing.scan(r.model, r.taps, SAMPLES)
    todo = batch_size(r.model, r.anatomy).split([s.tokens for s in SAMPLES])
    assert len(todo) < len(SAMPLES)
    assert len(calls) <= len(todo) * len(r.anatomy.layers)


def test_a_cancel_stops_between_batches_and_leaves_no_tap_recording(rig):
    r = rig("qwen3_moe")

    class StopAfterOne(Context):
        def __init__(self) -> None:
            self.checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks == 2:
                raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        sample_routing.scan(r.model, r.taps, SAMPLES, StopAfterOne())
    assert not any(tap.clients for tap in r.taps.layers)


@pytest.fixture(scope="module")
def tokenizer():
    return load("demo").tokenizer


def chat(*turns: str) -> Line:
    roles = ("user", "assistant")
    return Line(
        "messages",
        tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)),
        f"chat {turns[0]}",
    )


def test_the_answer_is_the_last_turn_of_the_assistant(tokenizer):
    line = chat("What is a kidney?", "An organ.", "And a lung?", "Another organ.")
    (sample,) = sample_routing.samples([line], tokenizer, 512)
    tokens = sample.tokens.tolist()
    assert tokenizer.decode(tokens[sample.answer :]).startswith("Another organ.")
    assert tokenizer.decode(tokens[: sample.answer]).endswith("<|im_start|>assistant\n")


def test_a_prompt_without_an_answer_gets_the_generation_prompt(tokenizer):
    (sample,) = sample_routing.samples([chat("How do locks work?")], tokenizer, 512)
    assert sample.answer is None
    assert tokenizer.decode(sample.tokens.tolist()).endswith("<|im_start|>assistant\n")
    pair = Line("prompt", ("How do locks work?", ""), "x:1")
    (same,) = sample_routing.samples([pair], tokenizer, 512)
    assert same.tokens.tolist() == sample.tokens.tolist()


def test_a_completion_is_an_answer_and_a_text_has_none(tokenizer):
    pair = Line("prompt", ("Two and two?", "Four."), "x:1")
    text = Line("text", "contract Wallet { }", "x:2")
    first, second = sample_routing.samples([pair, text], tokenizer, 512)
    assert tokenizer.decode(first.tokens.tolist()[first.answer :]).startswith("Four.")
    assert second.answer is None


def test_an_answer_that_was_cut_off_is_none(tokenizer):
    line = chat("Tell me a story about a very long road", "Once there was a road.")
    (sample,) = sample_routing.samples([line], tokenizer, 6)
    assert len(sample.tokens) == 6
    assert sample.answer is None


def test_texts_too_short_to_run_are_left_out_and_nothing_left_is_an_error(tokenizer):
    short = Line("text", "a", "x:1")
    assert (
        len(sample_routing.samples([short, Line("text", "a longer text", "x:2")], tokenizer, 64))
        == 1
    )
    with pytest.raises(DatasetError, match="all 1 samples are shorter than two tokens"):
        sample_routing.samples([short], tokenizer, 64)
