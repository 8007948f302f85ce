"""Narrower experts in every family: what is staged is what stock loading makes of the saved file, and
undo brings back every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from rigs import Rig, StopAt, keep_fewer, make_rig

from mlxfun.calibration.options import CollectOptions
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_lines, tokenize
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import Cancelled, PlanError, StateError, UsageError
from mlxfun.model.anatomy.width import width_keys
from mlxfun.model.delta import Delta
from mlxfun.model.experts import Bank
from mlxfun.model.export import ExportView
from mlxfun.model.identity import state_id
from mlxfun.model.parameters import dequantised, flatten
from mlxfun.techniques.narrow import delta as layer_delta
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.narrow.technique import _Narrowing
from tests.families import spread

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43]]
TEXT = [
    np.random.default_rng(n).integers(1, 61, length).astype(np.int32)
    for n, length in enumerate((40, 33, 48))
]
REFUSED = {
    "jamba": "intermediate_size also sizes model.layers",
    "llama4": "text_config.intermediate_size also sizes the shared expert",
    "deepseek_v41": "moe_intermediate_size also sizes the shared expert",
    "phixtral": "no key of config.json holds their 128 neurons",
    "dbrx": "keeps its experts as separate modules",
}
NARROWED = tuple(name for name in tiny_models.RUNNABLE if name not in REFUSED)


@dataclass
class Bench(Rig):
    """What narrowing asks of a workspace."""

    calibration: Sequence[Any] = ()

    @classmethod
    def of(cls, rig: Rig) -> Bench:
        return cls(**{f.name: getattr(rig, f.name) for f in fields(Rig)}, calibration=TEXT)

    def export(self) -> ExportView:
        return ExportView(self.model, self.resident, self.anatomy, {})


@pytest.fixture(autouse=True)
def few_tokens_suffice(monkeypatch) -> None:
    monkeypatch.setattr(layer_delta, "LEAST_TOKENS", 4)


def run(rig: Rig, ctx: Context = SILENT, **options):
    """(plan, delta); the model is as before."""
    work = _Narrowing.of(Bench.of(rig), NarrowOptions(**options), TEXT)
    deltas = work.run(ctx)
    return work.plan(), Delta(tuple(deltas))


def values(rig: Rig) -> dict[str, np.ndarray]:
    return {
        path: np.array(array.view(mx.uint8) if array.dtype == mx.bfloat16 else array)
        for path, array in flatten(rig.model.parameters())
    }


def same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def check_round_trip(rig: Rig, **options) -> None:
    before, weights = rig.logits(PREFILL), values(rig)
    plan, delta = run(rig, **options)
    assert same(before, rig.logits(PREFILL)), "planning leaves the model as it was"
    assert rig.resident.ledger == {}
    undo = rig.resident.swap(delta)
    candidate, state = rig.logits(PREFILL), state_id("x", rig.resident.ledger)
    assert not same(before, candidate)
    assert set(rig.resident.expert_widths) == {plan.width}
    assert same(candidate, rig.saved_and_reloaded()(mx.array(PREFILL)))
    redo = rig.resident.swap(rig.resident.released(undo))
    assert same(before, rig.logits(PREFILL))
    assert (rig.resident.ledger, rig.resident.made) == ({}, set())
    back = values(rig)
    assert all(np.array_equal(weights[path], back[path], equal_nan=True) for path in weights)
    rig.resident.swap(redo)
    assert same(candidate, rig.logits(PREFILL))
    assert state_id("x", rig.resident.ledger) == state


@pytest.mark.parametrize("name", spread(NARROWED))
def test_what_is_staged_is_what_is_saved_and_undo_is_exact(rig, name) -> None:
    check_round_trip(rig(name), fraction=0.25)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_without_a_width_of_its_own_is_refused_by_the_key(rig, name) -> None:
    with pytest.raises(PlanError) as refused:
        run(rig(name), fraction=0.25)
    assert REFUSED[name] in str(refused.value)


ALL_MODES = tiny_models.MODES | tiny_models.MORE_MODES
PACKED = [("qwen3_moe", mode) for mode in ALL_MODES]
PACKED += [("deepseek_v3", "mxfp4"), ("nemotron_h", "affine4"), ("gpt_oss", "mxfp4")]


def packed(name: str, mode: str) -> tuple[Rig, int]:
    """A tiny model with experts of three groups of neurons, and how many neurons a group has."""
    group = ALL_MODES[mode]["group_size"]
    model, config = tiny_models.build(name, wide=True)
    rig = make_rig(model, config)
    width = rig.resident.expert_widths[0]
    keys = width_keys(config, rig.anatomy, width)
    config = keys.written(config, 3 * group, None)
    model = tiny_models.from_config(config)
    return make_rig(model, tiny_models.quantise(model, config, mode)), group


@pytest.mark.parametrize(("name", "mode"), PACKED)
def test_packed_experts_lose_whole_groups_and_keep_every_value(name, mode) -> None:
    r, group = packed(name, mode)
    modules = r.resident.tree.modules
    banks = {m.layer.index: Bank.of(m, modules) for m in r.resident.layers}
    before = {i: (b.weights(b.inward[0]), b.weights(b.outward)) for i, b in banks.items()}
    _, delta = run(r, width=2 * group)
    undo = r.resident.swap(delta)
    choices = [
        [g * group + i for g in pair for i in range(group)] for pair in ((0, 1), (0, 2), (1, 2))
    ]
    for moe in r.resident.layers:
        bank = Bank.of(moe, modules)
        rows, columns = (np.array(a) for a in before[moe.layer.index])
        new_rows, new_columns = (
            np.array(bank.weights(name)) for name in (bank.inward[0], bank.outward)
        )
        for expert in range(len(bank.rows)):
            kept = [c for c in choices if np.array_equal(columns[expert][c], new_columns[expert])]
            assert kept, "the values of two whole groups, as they were"
            assert any(np.array_equal(rows[expert][c], new_rows[expert]) for c in kept)
    r.resident.swap(undo)
    assert r.resident.ledger == {}


@pytest.mark.parametrize(("name", "mode"), PACKED)
@pytest.mark.parametrize("requantize", [False, True])
def test_a_packed_model_is_saved_as_it_was_staged(name, mode, requantize) -> None:
    r, group = packed(name, mode)
    check_round_trip(r, width=2 * group, requantize=requantize)


def test_the_shared_expert_is_padded_and_puts_out_what_it_did(rig) -> None:
    r = rig("deepseek_v3")
    shared = r.anatomy.layers[0].shared[0]
    module = r.resident.tree.modules[shared]
    x = mx.random.normal((5, 32))
    before = module(x)
    _, delta = run(r, width=20)
    undo = r.resident.swap(delta)
    config = ExportView(r.model, r.resident, r.anatomy, {}).config(r.config)
    assert config["moe_intermediate_size"] == 20
    assert config["n_shared_experts"] * 20 == dequantised(module["gate_proj"]).shape[0]
    np.testing.assert_allclose(np.array(module(x)), np.array(before), rtol=1e-6, atol=1e-7)
    r.resident.swap(undo)


def test_the_refit_brings_the_layers_closer_to_what_they_put_out(rig) -> None:
    r = rig("qwen3_moe")
    fitted, _ = run(r, width=16)
    plain, _ = run(r, width=16, refit=False)
    assert all(fitted.errors[i] < plain.errors[i] for i in fitted.errors)
    assert "refitted" in fitted.strategy


def test_methods_choose_differently_and_wider_loses_less(rig) -> None:
    r = rig("qwen3_moe")
    errors = {m: run(r, width=16, method=m, refit=False)[0].errors for m in ("obs", "mean", "rms")}
    assert len({tuple(e.values()) for e in errors.values()}) == 3
    wider = run(r, width=28)[0].errors
    narrower = run(r, width=8)[0].errors
    assert all(wider[i] < narrower[i] for i in wider)


def test_experts_with_too_few_tokens_keep_their_largest_neurons_and_are_named(
    rig, monkeypatch
) -> None:
    monkeypatch.setattr(layer_delta, "LEAST_TOKENS", 10_000)
    r = rig("qwen3_moe")
    moe = r.resident.layers[0]
    bank = Bank.of(moe, r.resident.tree.modules)
    outward = np.array(bank.weights(bank.outward))
    inward = np.array(bank.weights("gate_proj"))
    plan, delta = run(r, width=16, refit=False)
    assert plan.scarce == {i: tuple(range(8)) for i in r.anatomy.indices}
    assert "saw too few tokens" in plan.warnings[0]
    with r.resident.trial(delta):
        got = np.array(Bank.of(moe, r.resident.tree.modules).weights("gate_proj"))
    for expert in range(8):
        largest = np.sort(np.argsort(-np.linalg.norm(outward[expert], axis=-1))[:16])
        np.testing.assert_array_equal(got[expert], inward[expert][largest])


def test_a_pruned_model_can_be_narrowed_and_a_narrowed_one_pruned(rig) -> None:
    r = rig("qwen3_moe")
    r.prune(keep_fewer(r.anatomy))
    _, delta = run(r, width=24)
    r.resident.swap(delta)
    once = r.logits(PREFILL)
    assert same(once, r.saved_and_reloaded()(mx.array(PREFILL)))
    _, again = run(r, width=16)
    r.resident.swap(again)
    assert same(r.logits(PREFILL), r.saved_and_reloaded()(mx.array(PREFILL)))


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_cancel_leaves_the_model_as_it_was(rig, at) -> None:
    r = rig("qwen3_moe")
    before = r.logits(PREFILL)
    with pytest.raises(Cancelled):
        run(r, StopAt(at), width=16)
    assert same(before, r.logits(PREFILL))
    assert (r.resident.ledger, set(r.resident.expert_widths)) == ({}, {32})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 32}, "they have 32 now"),
        ({"width": 40}, "they have 32 now"),
        ({"to_bytes": 1 << 40}, "the model takes"),
        ({"to_bytes": 1000}, "prune experts as well"),
    ],
)
def test_widths_that_cannot_be_are_refused_with_the_range(rig, options, message) -> None:
    with pytest.raises((UsageError, PlanError), match=message):
        run(rig("qwen3_moe"), **options)


def test_a_width_that_splits_a_group_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"packed in groups of 32; choose a multiple, e\.g\. 64"):
        run(packed("qwen3_moe", "mxfp4")[0], width=70)


def test_bytes_are_those_that_arithmetic_says(rig) -> None:
    r = rig("qwen3_moe")
    whole = Bench.of(r).export().total_bytes()
    layers, experts, hidden = 2, 8, 32
    per_neuron = layers * experts * 3 * hidden * 4
    target = whole - 10 * per_neuron + 5
    plan, delta = run(r, to_bytes=target)
    assert plan.width == 32 - 10
    with r.resident.trial(delta):
        assert Bench.of(r).export().total_bytes() == whole - 10 * per_neuron


def test_a_session_narrows_on_its_own_text_or_that_of_the_last_collect(session) -> None:
    data = DatasetOptions("demo:mixed", max_samples=4, max_tokens=32)
    session._observations.calibration = ()
    with pytest.raises(StateError, match="give --dataset"):
        session.narrow(NarrowOptions(fraction=0.25))
    own = session.narrow(NarrowOptions(fraction=0.25, data=data))
    session.discard()
    session.collect(CollectOptions(data))
    session._observations.calibration = tuple(tokenize(read_lines(data), session.tokenizer, 32))
    collected = session.narrow(NarrowOptions(fraction=0.25))
    assert own.state_after == collected.state_after
    session.discard()
