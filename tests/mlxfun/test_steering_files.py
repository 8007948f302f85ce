"""Steering from scan reports and configuration files: right side, right layer, within the router."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.contrast import Contrast
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.options import ApplyOptions, CollectOptions, DatasetOptions, PruneOptions, SteerOptions
from mlxfun.scan_reports import Identity, write_report
from mlxfun.steering_files import read

NOW = Identity("m", "s", "name")


def report(path, kind, r, composite: dict, **about):
    """A report that flags the experts of {(position, expert): composite} by their sign."""
    shape = (len(r.anatomy.layers), r.anatomy.num_experts)
    values = np.zeros(shape)
    for (row, expert), value in composite.items():
        values[row, expert] = value
    found = Contrast(
        values, values, values, values, values, values, values > 0, values < 0, values != 0, None
    )
    write_report(path, kind, found, r.anatomy.indices, {"model": "m", "state": "s"} | about)
    return path


@pytest.fixture
def tiny(rig):
    """deepseek_v3: its first layer is dense, so the MoE layer at position 0 is decoder layer 1."""
    return rig("deepseek_v3", n_group=1, topk_group=1)


def steer(r, **options):
    return read(SteerOptions(**options), r.resident, NOW, "s")


def test_safe_activates_what_works_on_harmful_prompts_and_unsafe_the_reverse(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9, (0, 2): -0.4})
    (layer,) = tiny.anatomy.indices[:1]
    assert layer == 1
    safe = steer(tiny, safety_map=path)
    assert (safe.activate, safe.deactivate) == ({1: (5,)}, {1: (2,)})
    unsafe = steer(tiny, safety_map=path, safety_mode="unsafe")
    assert (unsafe.activate, unsafe.deactivate) == ({1: (2,)}, {1: (5,)})
    assert safe.notices == []


def test_a_domain_is_boosted_or_suppressed_and_general_experts_are_left_alone(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {(0, 5): 0.9, (0, 2): -0.4})
    boost = steer(tiny, domain_map=path)
    assert (boost.activate, boost.deactivate) == ({1: (5,)}, {})
    suppress = steer(tiny, domain_map=path, domain_mode="suppress")
    assert (suppress.activate, suppress.deactivate) == ({}, {1: (5,)})


def test_activations_are_capped_at_top_k_by_strength_with_a_notice(tiny, tmp_path):
    composite = {(0, 1): 0.2, (0, 4): 0.9, (0, 6): 0.5, (0, 7): 0.3}
    path = report(tmp_path / "d.json", "domain", tiny, composite)
    wish = steer(tiny, domain_map=path)
    assert set(wish.activate[1]) == {4, 6}
    assert wish.notices == [
        "layer 1: each token uses 2 experts; of those the report names, the weakest, [1, 7], are "
        "left out"
    ]


def test_deactivations_leave_the_router_enough_experts(tiny, tmp_path):
    composite = {(0, e): 0.1 * (e + 1) for e in range(8)}
    path = report(tmp_path / "d.json", "domain", tiny, composite)
    wish = steer(tiny, domain_map=path, domain_mode="suppress")
    assert set(wish.deactivate[1]) == {2, 3, 4, 5, 6, 7}


def test_only_the_strongest_are_taken_when_asked(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.3, (0, 1): 0.6, (0, 2): -0.4})
    wish = steer(tiny, safety_map=path, max_experts=2)
    assert (wish.activate, wish.deactivate) == ({1: (1,)}, {1: (2,)})


def test_activations_stay_within_the_groups_a_token_uses(rig, tmp_path):
    r = rig("deepseek_v3")  # two groups of four, one of them used
    path = report(tmp_path / "d.json", "domain", r, {(0, 0): 0.9, (0, 7): 0.8, (0, 3): 0.7})
    wish = steer(r, domain_map=path)
    assert set(wish.activate[1]) == {0, 3}
    composite = {(0, e): 1.0 - 0.1 * e for e in (0, 1, 2)}
    path = report(tmp_path / "e.json", "domain", r, composite)
    wish = steer(r, domain_map=path, domain_mode="suppress")
    assert set(wish.deactivate[1]) == {0, 1}, "a group must keep the two that a token uses"


def test_pruned_experts_of_a_report_are_left_out_with_a_notice(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.4})
    tiny.prune(dict.fromkeys(tiny.anatomy.indices, (0, 1, 2, 3)))
    wish = steer(tiny, domain_map=path)
    assert wish.activate == {1: (2,)}
    assert wish.notices == ["layer 1: experts [5] are pruned; left out"]


def test_a_report_that_names_nobody_says_so(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {})
    assert steer(tiny, domain_map=path).notices == [
        f"{path} names no experts to steer: it has no effect"
    ]


def test_a_report_of_another_state_needs_allow_stale_and_both_are_named(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9}, state="other")
    with pytest.raises(StateError, match=r"made on state other, the model is at s;.*--allow"):
        steer(tiny, safety_map=path)
    wish = steer(tiny, safety_map=path, allow_stale=True)
    assert wish.activate == {1: (5,)}
    assert wish.notices == [f"{path} was made on state other, the model is at s"]


def test_sources_that_contradict_each_other_are_refused(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9})
    with pytest.raises(PlanError, match=r"experts \[5\] are asked to be both"):
        steer(tiny, safety_map=path, deactivate={1: (5,)})


def config(tmp_path, **document):
    path = tmp_path / "steer.json"
    path.write_text(json.dumps(document))
    return path


def test_a_configuration_names_layer_positions_and_values(tiny, tmp_path):
    path = config(
        tmp_path, activate={"0": [3]}, deactivate={"0": [1, 6]}, rule="additive",
        boost_value=1.5, mask_value=-1e9,
    )  # fmt: skip
    wish = steer(tiny, config=path)
    assert (wish.activate, wish.deactivate) == ({1: (3,)}, {1: (1, 6)})
    assert wish.rule == {"rule": "additive", "boost_value": 1.5, "mask_value": -1e9}
    own = steer(tiny, config=path, boost_value=4.0)
    assert own.rule["boost_value"] == 4.0, "the command line goes before the file"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"actviate": {"0": [1]}}, "unknown keys 'actviate'; a steering configuration has activ"),
        ({"activate": {"9": [1]}}, "the layers under 'activate' must be 0..0, each once"),
        ({"activate": {"0": [8]}}, "names unknown experts 8; they are 0..7"),
        ({"activate": [1]}, "has no table 'activate'"),
        ({"activate": {"0": [1]}, "mask_value": "x"}, "mask_value 'x' is not a number"),
        ({"activate": {"0": [1]}, "rule": "softly"}, "rule 'softly': choose one of steermoe, add"),
        ({"layer_indices": [0, 1], "activate": {}}, r"this model has \[1\]"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tiny, tmp_path, document, message):
    assert tiny.anatomy.indices == (1,)
    with pytest.raises(PlanError, match=message):
        steer(tiny, config=config(tmp_path, **document))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safety_mode": "kind"}, "--safety-mode 'kind': choose one of safe, unsafe"),
        ({"domain_mode": "up"}, "--domain-mode 'up': choose one of boost, suppress"),
        ({"rule": "hard"}, "--rule 'hard': choose one of steermoe, additive"),
        ({"max_experts": 3}, "--max-experts limits a map"),
        ({"boost_value": -1.0}, "boost_value -1 must be a finite number above 0"),
        ({"mask_value": 2.0}, "mask_value 2 must be a finite number below 0"),
        ({"mask_value": float("-inf")}, "mask_value -inf must be a finite number"),
    ],
)
def test_impossible_options_are_refused(tiny, options, message):
    with pytest.raises(UsageError, match=message):
        steer(tiny, **options)


def test_a_session_keeps_its_steering_when_a_file_is_refused_and_its_weights_when_it_is_not(
    tmp_path,
):
    session = Session.open("demo")
    state = session.state
    data = {"0": [1, 2]}
    session.steer(SteerOptions(activate={3: (4,)}))
    with pytest.raises(PlanError):
        session.steer(SteerOptions(config=config(tmp_path, activate={"99": [1]})))
    assert session.editor.steering.activate == {3: (4,)}
    found = session.steer(
        SteerOptions(config=config(tmp_path, deactivate=data, mask_value=-3), rule="additive")
    )
    assert found.activated == {3: (4,)}
    assert found.deactivated == {0: (1, 2)}
    assert found.summary() == "steering: 1 activated, 2 deactivated, adding +2 and -3"
    assert session.state == state
    cleared = session.steer(SteerOptions(clear=True, boost_value=1.0))
    assert cleared.summary() == "no steering"
    assert cleared.notices == ("without --rule additive, boost_value changes nothing",)
    session.close()


def test_a_map_made_before_a_prune_is_refused_after_it(tmp_path):
    session = Session.open("demo")
    shape = (len(session.anatomy.layers), session.anatomy.num_experts)
    values = np.zeros(shape)
    values[2, 3] = 1.0
    found = Contrast(*[values] * 6, values > 0, values < 0, values != 0, None)
    path = tmp_path / "s.json"
    write_report(path, "safety", found, session.anatomy.indices, {"state": session.state})
    options = SteerOptions(safety_map=path)
    assert session.steer(options).activated == {2: (3,)}
    before = session.state
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=2, max_tokens=32)))
    session.prune(PruneOptions(n_prune=1, safety_map=path))
    session.apply(ApplyOptions())
    with pytest.raises(
        StateError, match=f"made on state {before}, the model is at {session.state}"
    ):
        session.steer(options)
    again = session.steer(replace(options, allow_stale=True))
    assert again.activated == {2: (3,)}
    session.close()
