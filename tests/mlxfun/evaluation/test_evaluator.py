"""Perplexity, confidence interval, KL and agreement against a slow float64 reference."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from rigs import keep_fewer

from mlxfun.errors import DatasetError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator, Likelihood
from mlxfun.evaluation.figures import joined, kl_figures, perplexity
from mlxfun.hooks.head import HeadTap
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.parameters import dequantised, requantised
from tests.families import spread

SEQUENCES = tuple(
    np.array([(3 * i + 7 * n + i * i) % 61 for i in range(length)], dtype=np.int32)
    for n, length in enumerate((5, 17, 9, 30, 2, 12))
)
DATA = EvalSet("set", SEQUENCES)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


def naive(model) -> list[np.ndarray]:
    """Log-probabilities [T-1, V] of each sequence, alone, in float64."""
    return [log_softmax(np.array(model(mx.array(s[None])))[0, :-1]) for s in SEQUENCES]


# With softcaps (gemma) and scales (granite) after the head.
@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_figures_equal_a_slow_reference_on_every_architecture(rig, name):
    r = rig(name)
    head = HeadTap(r.model, r.anatomy.head)
    evaluator = Evaluator(r.model, head, r.anatomy)
    base = naive(r.model)
    reference = evaluator.reference("base", DATA)
    undo = r.prune(keep_fewer(r.anatomy))
    pruned = naive(r.model)

    class AtBase:
        def __enter__(self):
            self.redo = r.resident.swap(undo)

        def __exit__(self, *_):
            r.resident.swap(self.redo)

    likelihood, (comparison,) = evaluator.compare(DATA, [reference], [AtBase])
    nll = np.concatenate(
        [-p[np.arange(len(s) - 1), s[1:]] for p, s in zip(pruned, SEQUENCES, strict=True)]
    )
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(base, pruned, strict=True)])
    agree = np.concatenate(
        [p.argmax(-1) == q.argmax(-1) for p, q in zip(base, pruned, strict=True)]
    )
    order = np.argsort(likelihood.sequence, kind="stable")
    np.testing.assert_allclose(likelihood.nll[order], nll, rtol=1e-4, atol=1e-5)
    figures = kl_figures([comparison])
    assert abs(figures["kl_mean"] - kl.mean()) <= 1e-5
    assert abs(figures["top1_agreement"] - agree.mean()) <= 1 / len(agree)
    value, (low, high) = perplexity(likelihood)
    assert value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert low < value < high


def test_a_reference_is_read_once_and_costs_no_forward_afterwards(rig):
    r = rig("qwen3_moe")
    evaluator = Evaluator(r.model, HeadTap(r.model, r.anatomy.head), r.anatomy)
    first = evaluator.reference("base", DATA)
    calls = []
    evaluator._model = lambda *_: calls.append(1)
    assert evaluator.reference("base", DATA) is first
    assert not calls
    assert evaluator.has_reference("base", DATA)
    assert not evaluator.has_reference("base", EvalSet("set", SEQUENCES[:2]))


def edit_head(r) -> Delta:
    """Swap other values into the head (or the embedding it is tied to); what leads back."""
    path = r.map.head.path
    module = r.resident.tree.modules[path]
    noise = mx.random.normal((64, r.map.hidden_size), key=mx.random.key(5))
    new = requantised(module, dequantised(module) + 0.3 * noise, lambda leaf: module[leaf].dtype)
    arrays = {f"{path}.{leaf}": array for leaf, array in new.items()}
    assert len(arrays) == (3 if "scales" in module else 1)
    return r.resident.swap(Delta((LayerDelta(None, arrays=arrays),)))


@pytest.mark.parametrize("mode", [None, "affine4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "hunyuan", "llama", "qwen3"])
def test_a_reference_is_compared_by_its_own_head_after_the_head_was_edited(rig, name, mode):
    r = rig(name, mode=mode)
    assert r.map.head.tied == (name in ("hunyuan", "qwen3"))
    evaluator = Evaluator(r.model, HeadTap(r.model, r.map.head), r.anatomy)
    base = naive(r.model)
    reference = evaluator.reference(("base", ""), DATA)
    assert reference.hidden is not None, "compared by its hidden states, not by a second forward"
    back = edit_head(r)
    edited = naive(r.model)
    likelihood, (comparison,) = evaluator.compare(DATA, [reference], [nullcontext])
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(base, edited, strict=True)])
    assert kl.mean() > 0.1, "the edit is felt"
    order = np.argsort(likelihood.sequence, kind="stable")
    np.testing.assert_allclose(comparison.kl[order], kl, rtol=2e-3, atol=2e-4)
    assert abs(kl_figures([comparison])["kl_mean"] - kl.mean()) <= 1e-4
    r.resident.swap(back)
    _, (comparison,) = evaluator.compare(DATA, [reference], [nullcontext])
    assert kl_figures([comparison])["kl_mean"] < 1e-5


def test_a_frozen_head_shares_its_arrays_and_knows_no_hooks(rig):
    r = rig("llama")
    head = HeadTap(r.model, r.map.head)
    hidden = mx.random.normal((3, r.map.hidden_size))
    plain, module = head.logits(hidden), r.resident.tree.modules[r.map.head.path]
    held = mx.get_active_memory()
    with head.watching():
        frozen = head.frozen()
        assert np.array_equal(np.array(frozen(hidden)), np.array(plain))
        assert head.seen is None, "it was not the watched head that ran"
    assert mx.get_active_memory() - held < module.weight.nbytes
    module.weight = mx.zeros_like(module.weight)
    assert np.array_equal(np.array(frozen(hidden)), np.array(plain))
    assert not np.array(head.logits(hidden)).any()


def test_watching_the_head_leaves_the_model_as_it_was(rig):
    for name in ("qwen3_moe", "hunyuan"):  # an untied and a tied head
        r = rig(name)
        head = HeadTap(r.model, r.anatomy.head)
        module = dict(r.model.named_modules())[r.anatomy.head.path]
        kind, plain = type(module), r.logits([[1, 2, 3]])
        with head.watching():
            out = r.model(mx.array([[1, 2, 3]]))
            assert np.array_equal(np.array(head.logits(head.seen)), np.array(out))
        assert type(module) is kind
        assert np.array_equal(np.array(plain), np.array(out))


def test_the_interval_treats_sequences_as_the_units():
    """By hand: two sequences of two tokens with losses (1, 1) and (3, 3): m = 2, se = sqrt(2*8)/4."""
    likelihood = Likelihood(np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))
    value, (low, high) = perplexity(likelihood)
    assert value == pytest.approx(math.exp(2))
    assert low == pytest.approx(math.exp(2 - 1.96))
    assert high == pytest.approx(math.exp(2 + 1.96))


def test_sets_are_joined_with_their_sequences_kept_apart():
    part = Likelihood(np.array([1.0, 2.0]), np.array([0, 1]))
    both = joined([part, part])
    assert both.sequence.tolist() == [0, 1, 2, 3]
    assert both.nll.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(DatasetError, match="no tokens to evaluate"):
        perplexity(Likelihood(np.array([]), np.array([], dtype=int)))


def test_batches_keep_the_logits_near_their_budget(rig):
    r = rig("qwen3_moe")
    evaluator = Evaluator(r.model, None, replace(r.anatomy, vocabulary=1 << 20))
    for batch in evaluator.batches(DATA):
        assert batch.tokens.size <= 64
    with nullcontext():
        assert sum(len(b.rows) for b in evaluator.batches(DATA)) == len(SEQUENCES)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4_text", "granitemoe", "cohere", "gemma2"])
def test_logits_in_chunks_give_the_figures_of_the_whole(rig, name, monkeypatch):
    r = rig(name)
    whole = Evaluator(r.model, HeadTap(r.model, r.map.head), r.anatomy)
    chunked = Evaluator(r.model, HeadTap(r.model, r.map.head), r.anatomy)
    monkeypatch.setattr(Evaluator, "_chunk", 5)
    seen = []
    real = chunked._logits
    monkeypatch.setattr(chunked, "_logits", lambda h, *a: (seen.append(len(h)), real(h, *a))[1])
    parts = chunked.reference(("base", ""), DATA)
    assert parts.hidden is not None
    assert max(seen) == 5
    monkeypatch.setattr(Evaluator, "_chunk", 1 << 20)
    at_once = whole.reference(("base", ""), DATA)
    np.testing.assert_allclose(parts.likelihood.nll, at_once.likelihood.nll, rtol=1e-5)
    np.testing.assert_array_equal(parts.likelihood.sequence, at_once.likelihood.sequence)
    monkeypatch.setattr(Evaluator, "_chunk", 3)
    _, (same,) = chunked.compare(DATA, [at_once], [nullcontext])
    assert kl_figures([same])["kl_mean"] < 1e-5
