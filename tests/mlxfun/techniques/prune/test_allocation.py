"""Global budgets: the cheapest counts, and the padded form in which stock loading holds them."""

from __future__ import annotations

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.model.delta import Delta
from mlxfun.model.slicing import prune_layer
from mlxfun.steering.rules import raised_above_fill
from mlxfun.techniques.prune.allocation import (
    Budget,
    Budgeted,
    cheapest,
    grid,
    padded_delta,
    require_paddable,
)
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from tests.mlxfun import tiny_checkpoints

PREFILL = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]


def paddable(name: str) -> bool:
    from mlxfun.model.anatomy import discover

    layers = discover(*tiny_models.build(name)).layers
    return all(x.bias_name is not None and x.router_rows == x.num_experts for x in layers)


QUICK = ("deepseek_v3", "lfm2_moe", "bailing_hybrid")
FAMILIES = (
    *QUICK,
    *(pytest.param(n, marks=pytest.mark.slow) for n in tiny_models.RUNNABLE if n not in QUICK),
)


def bias_of(r, tap):
    path = f"{tap.layer.bias_owner}.{tap.layer.bias_name}"
    return path, r.resident.tree.get(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_model_is_the_unequal_one_and_is_saved_as_staged(rig, name):
    r = rig(name)
    if not paddable(name):
        with pytest.raises(PlanError, match="have no selection bias"):
            require_paddable(r.anatomy)
        return
    groups = r.anatomy.layers[0].n_group
    size = 8 // groups
    # The last of each group is silent in every second layer, so that layers differ.
    silent = tuple((g + 1) * size - 1 for g in range(groups))
    everyone = tuple(range(8))
    live = dict.fromkeys(r.anatomy.indices, everyone)
    dead = {x: silent if i % 2 == 0 else () for i, x in enumerate(r.anatomy.indices)}
    before = r.logits(PREFILL)
    unequal = Delta(
        tuple(
            prune_layer(
                r.resident, tap.layer, tap.live, tuple(e for e in everyone if e not in gone)
            )
            for tap in r.resident.layers
            if (gone := dead[tap.layer.index])
        )
    )
    back = r.resident.swap(unequal)
    plain = {tap: bias_of(r, tap) for tap in r.resident.layers if dead[tap.layer.index]}
    for tap, (path, bias) in plain.items():
        # Where live scores are below what losing groups are filled with, the model chooses among
        # losers; a padded file must not, since they may be silent. The shift is in both.
        r.resident.tree.put(path, raised_above_fill(tap.layer, bias).astype(bias.dtype))
    wanted = np.array(r.logits(PREFILL))
    for path, bias in plain.values():
        r.resident.tree.put(path, bias)
    r.resident.swap(back)
    undo = r.resident.swap(padded_delta(r.resident, r.stored, Budgeted(live, dead, ())))
    padded = r.logits(PREFILL)
    assert np.array(padded) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert mx.array_equal(padded, r.saved_and_reloaded()(mx.array(PREFILL))).item()
    with r.taps.recording(norms=False) as recording:
        r.logits([[(7 * i + i * i) % 61 for i in range(80)]])
        records = recording.drain()
    for tap, seen in zip(r.resident.layers, records, strict=True):
        assert not np.isin(np.array(seen[-1].indices), dead[tap.layer.index]).any()
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(PREFILL)).item()


def test_the_cheapest_counts_are_those_that_trying_all_finds():
    generator = np.random.default_rng(4)
    prices = [{c: float(generator.uniform(0, c + 1)) for c in (0, 2, 4, 6)} for _ in range(4)]
    trials = (c for c in product(*prices) if sum(c) == 12)
    slow = min(trials, key=lambda c: sum(p[n] for p, n in zip(prices, c, strict=True)))
    assert cheapest(prices, 12) == slow


def test_a_sum_that_no_counts_make_is_refused():
    with pytest.raises(PlanError, match="no counts of the layers sum to 3"):
        cheapest([{0: 0.0, 2: 1.0}, {0: 0.0, 2: 1.0}], 3)


def test_counts_respect_groups():
    assert grid(4, 2) == [0, 2, 4, 6, 8]
    assert grid(3, 1) == [0, 2, 3, 4, 6]


def test_the_layer_that_is_dear_loses_less(rig):
    r = rig("lfm2_moe", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    layers = len(r.anatomy.layers)
    assert layers > 1
    scores = np.tile(np.arange(8.0), (layers, 1))
    constraints = Constraints.free(r.anatomy.indices, 8, r.anatomy.top_k)

    def measure() -> float:
        gone = [8 - len(tap.live) for tap in r.resident.layers]
        return 10.0 * gone[0] + 1.0 * sum(gone[1:])

    found = Budget(r.resident, scores, constraints, PruneOptions(n_prune=2), measure).plan()
    assert found.counts[0] == min(found.counts) < 2
    assert sum(found.counts) == 2 * layers
    held = 8 - min(found.counts)
    assert {len(live) for live in found.live.values()} == {held}
    assert [held - len(found.dead[i]) for i in r.anatomy.indices] == [8 - c for c in found.counts]
    # The lowest scores go first, and what is only padding is the best of those that should go.
    last = r.anatomy.indices[-1]
    assert max(found.dead[last]) == found.counts[-1] - 1
    assert all(tap.live == tuple(range(8)) for tap in r.resident.layers)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    config = {**tiny_checkpoints.DEEPSEEK_V3, "num_hidden_layers": 3}
    path = tiny_checkpoints.write(tmp_path_factory.mktemp("v3") / "model", config, dtype=mx.float32)
    session = Session.open(path)
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=4, max_tokens=32)))
    yield session
    session.close()


def test_a_budget_in_a_session_claims_no_bytes_that_are_not_saved(biased, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlxfun.techniques.prune.allocation.cheapest",
        lambda prices, total: (0, total) if prices else (),
    )
    plan = biased.prune(PruneOptions(n_prune=2, budget="global"))
    first, second = biased.anatomy.indices
    assert [len(plan.kept[i]) for i in (first, second)] == [8, 4]
    assert plan.bytes_after == plan.bytes_before
    assert any("4 of which are never chosen and save no bytes" in w for w in plan.warnings)
    staged = np.array(biased.model(mx.array(PREFILL)))
    biased.apply(ApplyOptions())
    saved = biased.save(SaveOptions(tmp_path / "out"))
    assert saved.gate["load"] == "ok"
    again = Session.open(tmp_path / "out")
    assert np.array_equal(np.array(again.model(mx.array(PREFILL))), staged)
    again.close()
    silent = never_chosen(tmp_path / "out")
    assert {layer: len(experts) for layer, experts in silent.items()} == {str(second): 4}
    dead = silent[str(second)]
    gone = (dead[0], dead[-1])  # one of each group
    biased.select(SelectOptions(drop={first: (0, 7), second: gone}))
    biased.apply(ApplyOptions())
    biased.save(SaveOptions(tmp_path / "less"))
    assert never_chosen(tmp_path / "less") == {str(second): dead[1:-1]}, "who is gone is not silent"
    biased.undo()
    biased.undo()


def never_chosen(model):
    return json.loads((model / "reap_metadata.json").read_text())["never_chosen"]


def test_a_measured_budget_is_staged_previewed_and_undone(biased):
    before = np.array(biased.model(mx.array(PREFILL)))
    plan = biased.prune(PruneOptions(n_prune=2, budget="global"))
    gone = sum(map(len, plan.pruned.values()))
    assert gone == 4, "two from each of two layers, on average"
    assert biased.preview(EvaluateOptions()).kl_mean >= 0
    biased.apply(ApplyOptions())
    biased.undo()
    assert np.array_equal(np.array(biased.model(mx.array(PREFILL))), before)


def test_routers_without_a_bias_are_refused_before_any_work():
    session = Session.open("demo")
    with pytest.raises(PlanError, match=r"qwen3_moe have no selection bias .* --budget equal"):
        session.prune(PruneOptions(n_prune=4, budget="global"))
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "auto"}, "leave out --metric auto"),
        ({"sequential": True, "refit_experts": True}, "--sequential and --refit-experts"),
        ({"strategy": "strided"}, "leave out --strategy strided"),
    ],
)
def test_options_that_a_budget_cannot_be_combined_with_are_refused(biased, options, message):
    with pytest.raises(UsageError, match=message):
        biased.prune(PruneOptions(n_prune=2, budget="global", **options))


def test_a_budget_needs_samples_that_were_held_out(biased, monkeypatch):
    monkeypatch.setattr(biased._observations, "held_out", None)
    with pytest.raises(StateError, match="--budget global judges on samples"):
        biased.prune(PruneOptions(n_prune=2, budget="global"))
