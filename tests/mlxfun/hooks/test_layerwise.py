"""Hidden states carried layer by layer are those of the plain forward, bit for bit."""

from __future__ import annotations

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from rigs import keep_fewer

from mlxfun.context import Context
from mlxfun.data.datasets import batches
from mlxfun.errors import BudgetError, Cancelled
from mlxfun.hooks.layerwise import Carrier
from mlxfun.hooks.replay import intercepting

SEQUENCES = [
    np.array([(7 * i + i * i) % 61 for i in range(23)], np.int32),
    np.array([3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], np.int32),
    np.array([1, 60, 2, 50], np.int32),
]
RERUN = {"hunyuan", "deepseek_v41", "kimi_k3", "gemma4_text", "gemma4"}
"""Architectures whose layers hand on more than hidden states: observed by whole forwards."""
RERUN_DENSE = {"gptj", "iquestloopcoder", "rwkv7", "talkie", "gemma4_text_dense", "gemma3n", "afm7"}
"""The same, or whose layers are not called one after the other with hidden states."""


def _decoder_layers(r):
    return [r.resident.tree.modules[layer.path] for layer in r.map.layers]


def two_batches():
    return batches(SEQUENCES, 30, 2)


def plain_records(rig, tokens):
    """Records of every layer in one plain forward of the whole model."""
    with rig.taps.recording(logits=True, inputs=True) as recording:
        rig.model(mx.array(tokens))
        return recording.drain()


def equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def check_observations(rig, carrier):
    for position in range(len(rig.taps.layers)):
        seen = list(carrier.observe(position))
        assert len(seen) == 2
        for batch, (record,) in seen:
            (expected,) = plain_records(rig, batch.tokens)[position]
            for name in ("indices", "weights", "norms", "logits", "inputs"):
                assert equal(getattr(record, name), getattr(expected, name)), name


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_every_layer_is_observed_as_in_the_plain_forward_bit_for_bit(rig, name):
    r = rig(name)
    carrier = Carrier(r.model, r.taps, two_batches())
    assert (name in RERUN) == (carrier.obstacle is not None), carrier.obstacle
    check_observations(r, carrier)


@pytest.mark.parametrize("name", tiny_models.RUNNABLE_DENSE)
def test_dense_layers_are_replayed_bit_for_bit(rig, name):
    r = rig(name)
    carrier = Carrier(r.model, r.taps, two_batches())
    assert (name in RERUN_DENSE) == (carrier.obstacle is not None), carrier.obstacle
    last = len(r.map.layers) - 1
    carrier.arrive(last)
    if carrier.obstacle is not None:
        return
    entered = []

    def note(_, own, args, kwargs):
        entered.append(args[0])
        return own(*args, **kwargs)

    with intercepting([_decoder_layers(r)[last]], note):
        for batch in two_batches():
            mx.eval(r.model(mx.array(batch.tokens)))
    assert len(entered) == len(carrier.travels) == 2
    for travel, expected in zip(carrier.travels, entered, strict=True):
        assert equal(carrier.states.get(travel.number), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4_text", "dbrx"])
def test_a_layer_edited_on_the_way_is_what_later_layers_see(rig, name):
    r = rig(name)
    carrier = Carrier(r.model, r.taps, two_batches())
    list(carrier.observe(0))
    r.prune(keep_fewer(r.anatomy))  # layer 0 was observed unedited, and is run edited
    for batch, (record,) in carrier.observe(1):
        (expected,) = plain_records(r, batch.tokens)[1]
        assert equal(record.inputs, expected.inputs)


def test_observing_by_whole_forwards_sees_the_same(rig):
    r = rig("qwen3_moe")
    carrier = Carrier(r.model, r.taps, two_batches())
    carrier.obstacle = "for the test"
    check_observations(r, carrier)


def test_attention_runs_once_for_observing_and_moving_on(rig):
    r = rig("qwen3_moe")
    carrier = Carrier(r.model, r.taps, two_batches())
    calls = []

    def count(number, own, args, kwargs):
        calls.append(number)
        return own(*args, **kwargs)

    layers = _decoder_layers(r)
    with intercepting([layer.self_attn for layer in layers], count):
        for position in range(len(layers)):
            list(carrier.observe(position))
    assert calls == [n for n in range(len(layers)) for _ in range(2)]


def test_a_model_whose_layers_share_more_than_hidden_states_is_noticed(rig):
    """Here a layer's output depends on how many layers ran before it."""
    r = rig("qwen3_moe")
    memory = []

    def remembers(number, own, args, kwargs):
        memory.append(number)
        return own(*args, **kwargs) * float(len(memory))

    with intercepting(_decoder_layers(r), remembers):
        carrier = Carrier(r.model, r.taps, two_batches())
    assert carrier.obstacle == "its layers hand on more than hidden states"


def test_a_cancel_stops_between_batches(rig):
    class Stop(Context):
        def check(self) -> None:
            raise Cancelled("cancelled")

    r = rig("qwen3_moe")
    carrier = Carrier(r.model, r.taps, two_batches())
    with pytest.raises(Cancelled):
        list(carrier.observe(0, Stop()))
    assert all(tap.clients == [] for tap in r.taps.layers)


@contextmanager
def memory_for(rig, tokens):
    """A decoder layer fails for want of memory on more than `tokens` tokens, from its second use."""
    layer = _decoder_layers(rig)[1]

    def run(_, own, args, kwargs):
        if args[0].shape[0] * args[0].shape[1] > tokens:
            raise RuntimeError("[metal::malloc] Unable to allocate 1 bytes.")
        return own(*args, **kwargs)

    with intercepting([layer], run):
        yield


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "kimi_k3", "gpt_oss"])
def test_a_batch_that_does_not_fit_runs_in_halves_and_is_seen_whole(rig, name):
    r = rig(name)
    heard = Heard()
    carrier = Carrier(r.model, r.taps, batches(SEQUENCES * 2, 1000, 6), heard)
    (whole,) = (batch.tokens.size for batch in carrier._batches)
    found = {}
    with memory_for(r, whole // 2):
        for position in range(len(r.taps.layers)):
            ((batch, (record,)),) = carrier.observe(position, heard)
            found[position] = record, batch
    for position, (record, batch) in found.items():
        (plain,) = plain_records(r, batch.tokens)[position]
        assert equal(record.indices, plain.indices)
        for field in ("weights", "norms", "logits", "inputs"):
            # Products of fewer rows may round otherwise.
            close = mx.allclose(getattr(record, field), getattr(plain, field), 1e-4, 1e-5)
            assert close.item(), field
    assert len([said for said in heard.said if "did not fit in memory" in said]) == 1


def test_one_row_that_does_not_fit_is_told(rig):
    r = rig("qwen3_moe")
    carrier = Carrier(r.model, r.taps, batches(SEQUENCES, 1000, 4))
    with memory_for(r, 3), pytest.raises(BudgetError, match="one sequence of 23 tokens"):
        carrier.arrive(len(r.map.layers))


class Heard(Context):
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event) -> None:
        self.said.append(getattr(event, "text", ""))
