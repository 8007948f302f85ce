"""Faders: a level is added to one expert's score, whatever else steers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from commands.registry import parse
from mlxfun.errors import PlanError, UsageError
from mlxfun.steering import rules as steer
from mlxfun.steering.checks import check
from mlxfun.steering.rules import Steering

TOKENS = [[(5 * i + i * i) % 61 for i in range(40)]]


def logits(r, steering: Steering) -> np.ndarray:
    checked, _ = check(steering, r.resident)
    steer.install(checked, r.resident, r.taps)
    return np.array(r.logits(TOKENS).astype(mx.float32))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "glm4_moe", "dbrx"])
def test_one_level_for_all_is_the_additive_rule(rig, name) -> None:
    r = rig(name)
    layers = [layer.index for layer in r.anatomy.layers]
    levels = Steering(levels={layer: {5: 1.5, 2: -3.0} for layer in layers})
    rule = Steering(
        dict.fromkeys(layers, (5,)),
        dict.fromkeys(layers, (2,)),
        rule="additive",
        boost_value=1.5,
        mask_value=-3.0,
    )
    assert np.array_equal(logits(r, levels), logits(r, rule))
    assert not np.array_equal(logits(r, levels), logits(r, Steering()))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_force_comes_after_the_faders(rig, name) -> None:
    r = rig(name)
    up = {layer.index: (5,) for layer in r.anatomy.layers}
    against = {layer.index: {5: -50.0} for layer in r.anatomy.layers}
    steering, _ = check(Steering(up, levels=against), r.resident)
    steer.install(steering, r.resident, r.taps)
    with r.taps.recording() as recording:
        out = r.model(mx.array(TOKENS))
        records = recording.drain()
        mx.eval(out, [a for layer in records for rec in layer for a in rec.arrays()])
    for (record,) in records:
        assert (np.array(record.indices) == 5).any(axis=-1).all()


def test_a_level_of_zero_takes_the_fader_away() -> None:
    some = Steering().with_levels({3: {7: 1.5, 8: 2.0}})
    assert some.with_levels({3: {7: 0.0}}).levels == {3: {8: 2.0}}
    assert some.with_levels({3: {7: 0.0, 8: 0.0}}).empty
    assert some.key != Steering().with_levels({3: {7: 1.5}}).key


def test_levels_are_checked(rig) -> None:
    r = rig("qwen3_moe")
    layer = r.anatomy.layers[0].index
    for levels, message in (
        ({layer: {99: 1.0}}, "has no expert 99"),
        ({layer: {1: 1e6}}, "the level 1e"),
        ({77: {1: 1.0}}, "decoder layer 77 is not an MoE layer"),
    ):
        with pytest.raises(PlanError, match=message):
            check(Steering(levels=levels), r.resident)


def test_levels_are_typed_as_expert_equals_number() -> None:
    assert parse("steer --level 3:7=1.5,5:0..1=-0.5").params["levels"] == {
        3: {7: 1.5},
        5: {0: -0.5, 1: -0.5},
    }
    for wrong in ("3:7", "3:7=x", "3:7=nan"):
        with pytest.raises(UsageError, match="is not L:E=X, such as"):
            parse(f"steer --level {wrong}")
