"""A tuned lens is nearer to the model than the plain one, and leaves the model alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tracing_rigs import bits, tiny

from mlxfun import Model
from mlxfun.errors import DatasetError, UsageError
from mlxfun.tracing.lenses.logit_lens import Lens, logit_lens
from mlxfun.tracing.lenses.tuned import (
    Tuning,
    load_lens,
    require_fitting_lens,
    save_lens,
    tune_lens,
)

TEXTS = ("The patient was given a dose of the drug and", "def add(a, b):\n    return a + b\n",
         "The old man went to the sea and", "import os\nimport sys\n", "contract Token { uint256 public",
         "She said that the king was")  # fmt: skip


def test_training_brings_every_layer_nearer_to_the_model_and_files_keep_it(tmp_path) -> None:
    model = Model.open("demo")
    rows = [model.parts.tokenizer.encode(text) for text in TEXTS * 4]
    before = bits(model.parts.model(mx.array([rows[0]])))
    lens = tune_lens(model, rows, [1, 3], Tuning(passes=3, rate=3e-3))
    assert bits(model.parts.model(mx.array([rows[0]]))) == before
    for layer in (1, 3):
        assert lens.after[layer] < 0.7 * lens.before[layer]
    path = tmp_path / "lens.safetensors"
    save_lens(lens, path)
    back = load_lens(path)
    assert (back.before, back.after) == (lens.before, lens.after)
    plain = logit_lens(model, TEXTS[0], Lens(layers=[1, 5]))
    tuned = logit_lens(model, TEXTS[0], Lens(layers=[1, 5], translate=back.translate))
    assert not np.array_equal(plain.ids[0], tuned.ids[0])
    assert np.array_equal(plain.ids[1], tuned.ids[1])  # the last layer has no map
    require_fitting_lens(back, model, "x")
    with pytest.raises(UsageError, match="has a map of"):
        require_fitting_lens(back, tiny("llama"), "x")


def test_the_loss_is_the_divergence_of_the_plain_lens_at_first() -> None:
    model = tiny("llama")
    rows = [[3, 14, 15, 9], [5, 6, 7, 8]]
    lens = tune_lens(model, rows, [0], Tuning(passes=0, held_out=0.5, seed=0))
    test = rows[int(np.random.default_rng(0).permutation(2)[0])]
    found = logit_lens(model, test, Lens(layers=[0], top_k=64))
    whole = np.array(model.parts.model(mx.array([test])))[0].astype(np.float64)
    log_p = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    q = np.zeros_like(log_p)
    np.put_along_axis(q, found.ids[0], found.probabilities[0].astype(np.float64), axis=-1)
    expected = (np.exp(log_p) * (log_p - np.log(q))).sum(-1).mean()
    assert lens.before[0] == pytest.approx(expected, rel=1e-3)
    assert lens.after == lens.before


def test_packed_models_are_tuned_through_their_heads() -> None:
    model = tiny("qwen3_moe", "affine4")
    rows = [[3, 14, 15, 9, 26, 5], [5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 5, 6]]
    lens = tune_lens(model, rows * 4, [0], Tuning(passes=4, rate=1e-2))
    assert lens.after[0] < lens.before[0]


def test_what_cannot_be_tuned_or_read_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        tune_lens(tiny("llama"), [[1, 2]])
    with pytest.raises(UsageError, match="several residual streams"):
        tune_lens(tiny("gemma3n"), [[1, 2], [3, 4]])
    with pytest.raises(DatasetError, match="is no file"):
        load_lens(tmp_path / "none.safetensors")
