"""Refitting the experts that stay: against a slow twin, and as an edit that is exact to undo."""

from __future__ import annotations

import threading
import time

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from merging_rigs import SEQUENCES, parameters
from mlx.utils import tree_flatten
from rigs import StopAt, keep_fewer

from mlxfun.data.datasets import batches
from mlxfun.errors import Cancelled, ModelError, PlanError
from mlxfun.model.experts import Bank
from mlxfun.model.identity import state_id
from mlxfun.model.slicing import compact_delta
from mlxfun.techniques.refit import least_squares as module
from mlxfun.techniques.refit.layerwise import Recalibration
from mlxfun.techniques.refit.least_squares import (
    SWEEPS,
    Routed,
    inverse_of,
    left_out,
    output,
    refit,
)

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]
STACKED = tuple(name for name in tiny_models.RUNNABLE if name != "dbrx")
SOME = ("qwen3_moe", "lfm2_moe", "deepseek_v3", "nemotron_h", "llama4")
MODES = (None, *tiny_models.MODES)
CASES = [
    pytest.param(
        name,
        mode,
        marks=() if name in SOME[:2] or (name in SOME and mode is None) else pytest.mark.slow,
    )
    for name in STACKED
    for mode in MODES
]


def same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def run_refit(r, ctx=None):
    recalibration = Recalibration(r, follow=True, refit_experts=True)
    keep = keep_fewer(r.anatomy)
    extra = () if ctx is None else (ctx,)
    given = batches(SEQUENCES, 64, 2)
    return recalibration.run(given, lambda tap, _: keep[tap.layer.index], *extra)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_refitted_prune_is_staged_saved_and_undone_bit_for_bit(rig, name, mode):
    r = rig(name, mode=mode)
    before, weights = r.logits(PREFILL), parameters(r)
    shapes = {p: (a.dtype, a.shape) for p, a in tree_flatten(r.model.parameters())}
    outcome = run_refit(r)
    assert same(before, r.logits(PREFILL)), "planning leaves the model as it was"
    assert r.resident.ledger == {}
    assert outcome.keep == keep_fewer(r.anatomy)
    assert all(fit.after < fit.before for fit in outcome.fits if fit.kept)
    undo = r.resident.swap(outcome.delta)
    candidate, state = r.logits(PREFILL), state_id("x", r.resident.ledger)
    assert same(candidate, r.saved_and_reloaded()(mx.array(PREFILL)))
    routers = {p.path for tap in r.resident.layers for p in tap.layer.router_parameters()}
    after = {p: (a.dtype, a.shape) for p, a in tree_flatten(r.model.parameters())}
    assert {p for p in shapes if shapes[p] != after[p]} <= routers
    expand = r.resident.swap(compact_delta(r.resident))
    assert same(candidate, r.logits(PREFILL))
    assert state_id("x", r.resident.ledger) == state
    r.resident.swap(expand)
    redo = r.resident.swap(r.resident.released(undo))
    assert same(before, r.logits(PREFILL))
    assert r.resident.ledger == {}
    assert r.resident.made == set()
    back = parameters(r)
    assert all(np.array_equal(weights[p], back[p], equal_nan=True) for p in weights)
    r.resident.swap(redo)
    assert same(candidate, r.logits(PREFILL))


def test_every_layer_puts_out_more_of_what_it_did(rig):
    outcome = run_refit(rig("qwen3_moe"))
    assert [fit.kept for fit in outcome.fits] == [True, True]

    assert all(fit.after < fit.before for fit in outcome.fits)


def test_experts_that_are_no_stack_are_refused_before_any_work(rig):
    with pytest.raises(PlanError, match="are no stack of known projections"):
        run_refit(rig("dbrx"))


def test_a_cancelled_pass_leaves_the_model_as_it_was(rig):
    r = rig("qwen3_moe")
    before = r.logits(PREFILL)
    with pytest.raises(Cancelled):
        run_refit(r, StopAt(7))
    assert same(before, r.logits(PREFILL))
    assert r.resident.ledger == {}
    assert all(tap.live == tuple(range(8)) for tap in r.resident.layers)


def routed_by_hand(r, tokens=40):
    """(bank, Routed, wanted) of the first layer with invented routing; expert 7 is never used."""
    tap = r.resident.layers[0]
    bank = Bank.of(tap, dict(r.model.named_modules()))
    generator = np.random.default_rng(5)
    x = generator.normal(size=(tokens, 32)).astype(np.float32)
    chosen = np.stack([generator.permutation(7)[:2] for _ in range(tokens)])
    weights = generator.uniform(0.2, 0.8, size=(tokens, 2)).astype(np.float32)
    wanted = generator.normal(size=(tokens, 32)).astype(np.float32)
    return bank, Routed(mx.array(x), chosen, weights), wanted


def naive_neurons(bank, e, x):
    gate, up = (np.array(bank.projection(n).weight[e]) for n in ("gate_proj", "up_proj"))
    g = gate @ x
    return g / (1 + np.exp(-g)) * (up @ x)


def naive_refit(bank, routed, wanted, ridge):
    """Descent over experts, each solved as an augmented least-squares problem [H; sqrt(mu) I]."""
    x, down = np.array(routed.inputs), np.array(bank.projection("down_proj").weight, np.float64)
    rows = {e: [] for e in range(8)}
    for t in range(len(x)):
        for e, w in zip(routed.chosen[t], routed.weights[t], strict=True):
            rows[int(e)].append((t, w * naive_neurons(bank, e, x[t])))
    change = {e: np.zeros((32, len(h[0][1]))) for e, h in rows.items() if h}

    def out(e, t):
        return sum(((down[e] + change[e]) @ h for s, h in rows[e] if s == t), np.zeros(32))

    for _ in range(SWEEPS):
        for e in change:
            tokens = [t for t, _ in rows[e]]
            H = np.array([h for _, h in rows[e]])
            others = [sum((out(o, t) for o in change if o != e), np.zeros(32)) for t in tokens]
            rest = np.array([wanted[t] for t in tokens]) - np.array(others) - H @ down[e].T
            mu = ridge * np.trace(H.T @ H) / H.shape[1]
            tall = np.vstack([H, np.sqrt(mu) * np.eye(H.shape[1])])
            right = np.vstack([rest, np.zeros((H.shape[1], 32))])
            change[e] = np.linalg.lstsq(tall, right, rcond=None)[0].T
    return change


def test_changes_are_those_of_a_slow_twin(rig):
    bank, routed, wanted = routed_by_hand(rig("qwen3_moe"))
    rest = mx.array(wanted) - output(bank, routed)
    found, ridge = refit(bank, routed, rest, (0.3,))
    expected = naive_refit(bank, routed, wanted, 0.3)
    assert ridge == 0.3
    assert found.keys() == expected.keys() == set(range(7))
    for e, change in expected.items():
        assert pytest.approx(change, rel=1e-3, abs=1e-4) == np.array(found[e]).T


def test_outputs_are_the_weighted_sum_of_the_experts_used(rig):
    bank, routed, _ = routed_by_hand(rig("qwen3_moe"), tokens=6)
    down, x = np.array(bank.projection("down_proj").weight), np.array(routed.inputs)
    for t in range(6):
        pairs = zip(routed.chosen[t], routed.weights[t], strict=True)
        slow = sum(w * down[e] @ naive_neurons(bank, e, x[t]) for e, w in pairs)
        assert np.array(output(bank, routed))[t] == pytest.approx(slow, rel=1e-4, abs=1e-5)


def test_noise_asks_for_a_larger_ridge_than_a_law_does(rig, monkeypatch):
    bank, routed, noise = routed_by_hand(rig("qwen3_moe"), tokens=400)
    monkeypatch.setattr(module, "STRETCH", 10)
    law = 0.5 * output(bank, routed)  # every expert half as large: found with next to no ridge
    assert refit(bank, routed, law)[1] == min(module.RIDGES)
    assert refit(bank, routed, mx.array(noise))[1] == max(module.RIDGES)


def test_a_fifth_of_the_tokens_is_left_out_in_stretches():
    out = left_out(1280)
    assert out.sum() == 256
    assert out[512:640].all()
    assert not out[:512].any()
    assert left_out(20).sum() == 4


@pytest.mark.parametrize("size", [1, 63, 65, 200])
def test_inverse_of_products_is_that_of_a_plain_inverse(size: int) -> None:
    rows = np.random.default_rng(size).normal(size=(2 * size, size)).astype(np.float32)
    products = rows.T @ rows
    wanted = np.linalg.inv(products.astype(np.float64) + 0.5 * np.eye(size))
    found = inverse_of(products, 0.5)
    assert np.abs(found - wanted).max() < 1e-12
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_products_that_are_not_finite_are_refused(bad: float) -> None:
    products = np.eye(80, dtype=np.float32)
    products[3, 5] = products[5, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        inverse_of(products, 0.1)


def test_other_threads_run_while_an_inverse_is_made() -> None:
    """Inverses are spread over the processors, which gains nothing if each holds the interpreter."""
    products = np.eye(1500)
    running, turns = threading.Event(), 0

    def make() -> None:
        running.set()
        inverse_of(products, 0.1)
        running.clear()

    maker = threading.Thread(target=make)
    maker.start()
    while maker.is_alive():
        turns += running.is_set()
        time.sleep(0.001)
    assert turns > 5
