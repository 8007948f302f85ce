"""Raising experts in their routers: exact where a bias holds it, least squares where rows do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from merging_rigs import SEQUENCES, parameters

from mlxfun.data.datasets import batches
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta
from mlxfun.model.parameters import dequantised
from mlxfun.steering.rules import Steering, install
from mlxfun.techniques.refit.least_squares import left_out
from mlxfun.techniques.router_bias.delta import (
    LOGITS,
    RIDGE,
    ROWS,
    SELECTION,
    Edit,
    fit,
    folds,
    way_of,
)

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]
QUICK = {("qwen3_moe", None), ("qwen3_moe", "affine4"), ("deepseek_v3", None), ("llama4", None),
         ("gemma4_text", None), ("dbrx", None)}  # fmt: skip
CASES = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
    for name in tiny_models.RUNNABLE
    for mode in (None, *tiny_models.MODES)
]


def edit_of(r) -> Edit:
    return Edit(r.resident, r.stored)


def folds_of(r, edit):
    taps = [tap for tap in r.resident.layers if way_of(tap.layer, edit.modules) == ROWS]
    return folds(Carrier(r.model, r.taps, batches(SEQUENCES, 64, 2)), taps)


def raise_expert(r, expert: int, value: float):
    edit = edit_of(r)
    found = folds_of(r, edit)
    addends = np.zeros(8)
    addends[expert] = value
    return Delta(
        tuple(edit.raised(tap, addends, found.get(tap.layer.position)) for tap in r.resident.layers)
    )


def share(r, expert: int) -> float:
    """Share of the tokens that use an expert, over all layers."""
    with r.taps.recording(norms=False) as recording:
        r.logits(PREFILL)
        records = recording.drain()
    return float(np.mean([(np.array(x[-1].indices) == expert).any(-1).mean() for x in records]))


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_raised_expert_is_chosen_more_and_saved_and_undone_bit_for_bit(rig, name, mode):
    r = rig(name, mode=mode)
    before, weights, used = r.logits(PREFILL), parameters(r), share(r, 3)
    undo = r.resident.swap(raise_expert(r, 3, 1.5))
    raised = r.logits(PREFILL)
    assert share(r, 3) > used
    assert mx.array_equal(raised, r.saved_and_reloaded()(mx.array(PREFILL))).item()
    after = parameters(r)
    assert {p: (a.dtype, a.shape) for p, a in after.items()} == {
        p: (a.dtype, a.shape) for p, a in weights.items()
    }
    changed = [p for p in weights if not np.array_equal(weights[p], after[p])]
    routers = {p.path for tap in r.resident.layers for p in tap.layer.router_parameters()}
    assert changed
    assert set(changed) <= routers
    for path in changed:
        assert np.array_equal(np.delete(weights[path], 3, 0), np.delete(after[path], 3, 0)), path
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(PREFILL)).item()
    assert r.resident.ledger == {}


@pytest.mark.parametrize(
    ("name", "way"), [("deepseek_v3", SELECTION), ("gpt_oss", LOGITS), ("qwen3_moe", ROWS)]
)
def test_addends_go_where_the_router_holds_them(rig, name, way):
    r = rig(name)
    assert way_of(r.resident.layers[0].layer, dict(r.model.named_modules())) == way


def test_the_direction_is_that_of_a_slow_twin():
    generator = np.random.default_rng(2)
    x = generator.normal(loc=(2, 0, 0, 1, 0, 0), size=(300, 6)).astype(np.float32)

    def direction(rows):
        mu = RIDGE * np.mean(np.sum(rows.astype(np.float64) ** 2, axis=0))
        tall = np.vstack([rows, np.sqrt(mu) * np.eye(6)])
        return np.linalg.lstsq(tall, np.r_[np.ones(len(rows)), np.zeros(6)], rcond=None)[0]

    found, out = fit(x), left_out(300)
    assert found.direction == pytest.approx(direction(x), rel=1e-3, abs=1e-5)
    factor = x[out] @ direction(x[~out])
    assert found.r2 == pytest.approx(1 - np.mean((1 - factor) ** 2), rel=1e-3)
    assert found.mean == pytest.approx(factor.mean(), rel=1e-3)
    assert found.deviation == pytest.approx(factor.std(), rel=1e-3)


def test_a_common_direction_is_found_whole_and_noise_is_not():
    generator = np.random.default_rng(2)
    noise = generator.normal(size=(500, 8)).astype(np.float32)
    common = noise.copy()
    common[:, 0] = 1.0
    assert fit(common).r2 == pytest.approx(1.0, abs=0.01)
    assert fit(noise).r2 < 0.1


def test_the_logit_of_a_raised_row_grows_by_the_boost_times_the_fit(rig):
    r = rig("qwen3_moe")
    edit = edit_of(r)
    tap = r.resident.layers[0]
    fold = folds_of(r, edit)[0]
    before = np.array(dequantised(edit.modules[tap.layer.logits]))
    addends = np.zeros(8)
    addends[5] = 0.75
    r.resident.swap(Delta((edit.raised(tap, addends, fold),)))
    after = np.array(dequantised(edit.modules[tap.layer.logits]))
    assert after[5] - before[5] == pytest.approx(0.75 * fold.direction, rel=1e-3, abs=1e-5)


def test_a_baked_never_does_not_blur_later_steering(rig):
    r = rig("deepseek_v3")
    tap = r.resident.layers[0]
    path = f"{tap.layer.bias_owner}.{tap.layer.bias_name}"
    own = np.array(r.resident.tree.get(path))
    r.resident.tree.put(path, mx.array(np.where(np.arange(8) == 0, -1e4, own).astype(np.float32)))
    install(Steering(deactivate={tap.layer.index: (5,)}), r.resident, r.taps)
    steered = np.array(r.taps.layers[0].bias)
    live = [1, 2, 3, 4, 6, 7]
    assert np.diff(steered[live]) == pytest.approx(np.diff(own[live]), abs=1e-6)
    assert steered[0] < -9000
