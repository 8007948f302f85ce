"""Staged, compacted and reloaded models agree bit for bit, on every architecture and quantisation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from rigs import keep_fewer

from mlxfun.model.slicing import compact_delta
from tests.families import spread

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]
LONG = [[(7 * i + i * i) % 61 for i in range(80)]]


def same(a: mx.array, b: mx.array) -> bool:
    return bool(np.array_equal(np.array(a), np.array(b)))


def decode(model, tokens: list[int]) -> list[np.ndarray]:
    cache = make_prompt_cache(model)
    out = [model(mx.array([tokens[:4]]), cache=cache)[:, -1]]
    out += [model(mx.array([[token]]), cache=cache)[:, -1] for token in tokens[4:]]
    mx.eval(out)
    return [np.array(o) for o in out]


def check_equal(rig, other) -> None:
    assert same(rig.logits(PREFILL), other(mx.array(PREFILL)))
    assert same(rig.logits(LONG), other(mx.array(LONG)))
    tokens = PREFILL[0][:9]
    for a, b in zip(decode(rig.model, tokens), decode(other, tokens), strict=True):
        assert np.array_equal(a, b)
    ragged = [PREFILL[0], PREFILL[0][:5] + [0] * (len(PREFILL[0]) - 5)]
    assert same(rig.logits(ragged), other(mx.array(ragged)))


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_a_virtual_prune_equals_the_sliced_model_bit_for_bit(rig, name):
    r = rig(name)
    before = r.logits(PREFILL)
    r.prune(keep_fewer(r.anatomy))
    assert not same(before, r.logits(PREFILL))
    check_equal(r, r.saved_and_reloaded())


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
def test_a_compacted_model_equals_the_staged_one_and_comes_back(rig, name):
    r = rig(name)
    before, base_bytes = r.logits(PREFILL), r.logits(LONG)
    undo_prune = r.prune(keep_fewer(r.anatomy))
    staged = r.logits(PREFILL)
    undo_compact = r.resident.swap(compact_delta(r.resident))
    assert same(staged, r.logits(PREFILL))
    redo_compact = r.resident.swap(undo_compact)
    assert same(staged, r.logits(PREFILL))
    undo_compact = r.resident.swap(redo_compact)
    r.resident.swap(undo_compact)
    r.resident.swap(undo_prune)
    assert same(before, r.logits(PREFILL))
    assert same(base_bytes, r.logits(LONG))
    assert r.resident.ledger == {}


@pytest.mark.parametrize("mode", tuple(tiny_models.MODES))
@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_quantised_models_prune_bit_for_bit(rig, name, mode):
    r = rig(name, mode=mode)
    experts = r.anatomy.layers[0].expert_parameters()
    assert name == "dbrx" or any(p.path.endswith(".scales") for p in experts)
    before = r.logits(PREFILL)
    undo = r.prune(keep_fewer(r.anatomy))
    assert same(r.logits(PREFILL), r.saved_and_reloaded()(mx.array(PREFILL)))
    r.resident.swap(undo)
    assert same(before, r.logits(PREFILL))
