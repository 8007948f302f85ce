"""Reducing the rows of packed experts takes the memory of a few of them, not of a whole stack."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from rigs import make_rig

from mlxfun.model.experts import Bank
from mlxfun.techniques.merge import alignment


@pytest.fixture
def bank() -> Bank:
    """48 experts of 128 neurons, 512 wide, in 4 bits: 12 MiB a projection in float32."""
    model, config = tiny_models.build(
        "qwen3_moe", num_experts=48, hidden_size=512, moe_intermediate_size=128, num_hidden_layers=1
    )
    nn.quantize(
        model,
        group_size=64,
        bits=4,
        class_predicate=lambda path, _: path.endswith("_proj") and "switch_mlp" in path,
    )
    r = make_rig(model, config)
    found = Bank.of(r.resident.layers[0], dict(model.named_modules()))
    mx.eval(model.parameters())
    return found


def alike(features: mx.array) -> np.ndarray:
    """Products of all rows, which do not depend on the signs of components."""
    rows = np.array(features).reshape(-1, features.shape[-1])[::16]
    return rows @ rows.T


def test_some_experts_at_a_time_give_the_same_features_in_little_memory(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = 4 * bank.weights("up_proj", [0]).size * len(bank.rows)
    found, peaks = [], []
    for bound in (1 << 30, 1 << 20):
        monkeypatch.setattr(alignment, "UNPACKED_BYTES", bound)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        features = alignment.weight_features(bank)
        mx.eval(features)
        peaks.append(int(mx.get_peak_memory()) - int(before))
        found.append(alike(features))
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)
    assert peaks[0] > stack
    assert peaks[1] < stack
