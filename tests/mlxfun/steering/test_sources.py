"""Steering from scan reports and configuration files: right side, right layer, within the router."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.data.scan_reports import Identity, write_report
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.scans.contrast import Contrast
from mlxfun.steering.checks import check
from mlxfun.steering.options import ScanMap, SteerOptions
from mlxfun.steering.rules import Steering
from mlxfun.steering.sources import read
from mlxfun.techniques.prune.options import PruneOptions

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


def safety(path, mode="safe", most=None):
    return ScanMap(path, "safety", mode, most)


def domain(path, mode="boost", most=None):
    return ScanMap(path, "domain", mode, most)


def steer(r, *maps, **options):
    options = {"maps": maps, **options}
    return read(SteerOptions(**options), r.resident, NOW, "s")


def test_safe_activates_what_works_on_harmful_prompts_and_unsafe_the_reverse(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9, (0, 2): -0.4})
    (layer,) = tiny.anatomy.indices[:1]
    assert layer == 1
    safe = steer(tiny, safety(path))
    assert (safe.activate, safe.deactivate) == ({1: (5,)}, {1: (2,)})
    unsafe = steer(tiny, safety(path, "unsafe"))
    assert (unsafe.activate, unsafe.deactivate) == ({1: (2,)}, {1: (5,)})
    assert safe.notices == []


def test_a_domain_is_boosted_or_suppressed_and_general_experts_are_left_alone(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {(0, 5): 0.9, (0, 2): -0.4})
    boost = steer(tiny, domain(path))
    assert (boost.activate, boost.deactivate) == ({1: (5,)}, {})
    suppress = steer(tiny, domain(path, "suppress"))
    assert (suppress.activate, suppress.deactivate) == ({}, {1: (5,)})
    general = steer(tiny, domain(path, "suppress-general"))
    assert (general.activate, general.deactivate) == ({}, {1: (2,)})


def test_activations_are_capped_at_top_k_by_strength_with_a_notice(tiny, tmp_path):
    composite = {(0, 1): 0.2, (0, 4): 0.9, (0, 6): 0.5, (0, 7): 0.3}
    path = report(tmp_path / "d.json", "domain", tiny, composite)
    wish = steer(tiny, domain(path))
    assert set(wish.activate[1]) == {4, 6}
    assert wish.notices == [
        f"layer 1: each token uses 2 experts; of those {path} names, the weakest, [1, 7], are left "
        "out"
    ]


def test_deactivations_leave_the_router_enough_experts(tiny, tmp_path):
    composite = {(0, e): 0.1 * (e + 1) for e in range(8)}
    path = report(tmp_path / "d.json", "domain", tiny, composite)
    wish = steer(tiny, domain(path, "suppress"))
    assert set(wish.deactivate[1]) == {2, 3, 4, 5, 6, 7}


def test_only_the_strongest_are_taken_when_asked(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.3, (0, 1): 0.6, (0, 2): -0.4})
    wish = steer(tiny, safety(path, most=2))
    assert (wish.activate, wish.deactivate) == ({1: (1,)}, {1: (2,)})


def test_activations_stay_within_the_groups_a_token_uses(rig, tmp_path):
    r = rig("deepseek_v3")  # two groups of four, one of them used
    path = report(tmp_path / "d.json", "domain", r, {(0, 0): 0.9, (0, 7): 0.8, (0, 3): 0.7})
    wish = steer(r, domain(path))
    assert set(wish.activate[1]) == {0, 3}
    composite = {(0, e): 1.0 - 0.1 * e for e in (0, 1, 2)}
    path = report(tmp_path / "e.json", "domain", r, composite)
    wish = steer(r, domain(path, "suppress"))
    assert set(wish.deactivate[1]) == {0, 1}, "a group must keep the two that a token uses"


def test_pruned_experts_of_a_report_are_left_out_with_a_notice(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.4})
    tiny.prune(dict.fromkeys(tiny.anatomy.indices, (0, 1, 2, 3)))
    wish = steer(tiny, domain(path))
    assert wish.activate == {1: (2,)}
    assert wish.notices == ["layer 1: experts [5] are pruned; left out"]


def test_a_report_that_names_nobody_says_so(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {})
    assert steer(tiny, domain(path)).notices == [
        f"{path} names no experts to steer: it has no effect"
    ]


def test_a_report_of_another_state_needs_allow_stale_and_both_are_named(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9}, state="other")
    with pytest.raises(StateError, match=r"made on state other, the model is at s;.*--allow"):
        steer(tiny, safety(path))
    wish = steer(tiny, safety(path), allow_stale=True)
    assert wish.activate == {1: (5,)}
    assert wish.notices == [f"{path} was made on state other, the model is at s"]


# --- several at once --------------------------------------------------------------------------


def sets(wish):
    """Both sides as sets, by layer."""
    return tuple({ly: set(e) for ly, e in s.items() if e} for s in (wish.activate, wish.deactivate))


def test_reports_of_a_kind_steer_together_each_in_its_mode_and_within_its_limit(tiny, tmp_path):
    one = report(tmp_path / "a.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.8})
    two = report(tmp_path / "b.json", "domain", tiny, {(0, 1): 0.7, (0, 4): 0.6, (0, 6): 0.5})
    three = report(tmp_path / "s.json", "safety", tiny, {(0, 7): -0.9, (0, 3): 0.1})
    wish = steer(tiny, domain(one, most=1), domain(two, "suppress", 2), safety(three, "unsafe", 1))
    assert sets(wish) == ({1: {5, 7}}, {1: {1, 4}})
    assert wish.notices == []
    assert [(use.path, use.mode, use.most, use.names, use.cells) for use in wish.maps] == [
        (str(one), "boost", 1, ((1, 2), (1, 5)), ((1, 5),)),
        (str(two), "suppress", 2, ((1, 1), (1, 4), (1, 6)), ((1, 1), (1, 4))),
        (str(three), "unsafe", 1, ((1, 3), (1, 7)), ((1, 7),)),
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_reports_that_disagree_the_later_one_decides_and_it_is_said(tiny, tmp_path, swapped):
    one = report(tmp_path / "a.json", "domain", tiny, {(0, 5): 0.1, (0, 2): 0.1})
    two = report(tmp_path / "b.json", "domain", tiny, {(0, 5): 0.9, (0, 6): 0.9})
    maps = (domain(one), domain(two, "suppress"))
    wish = steer(tiny, *(reversed(maps) if swapped else maps))
    if swapped:
        assert sets(wish) == ({1: {2, 5}}, {1: {6}})
        said = f"activated as {one} asks, not deactivated as {two} does"
    else:
        assert sets(wish) == ({1: {2}}, {1: {5, 6}})
        said = f"deactivated as {two} asks, not activated as {one} does"
    assert wish.notices == [f"layer 1: experts [5] are {said}"]


def test_reports_in_one_command_steer_as_they_do_one_after_the_other(tiny, tmp_path):
    one = report(tmp_path / "a.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.8})
    two = report(tmp_path / "b.json", "domain", tiny, {(0, 2): 0.7, (0, 4): 0.6})
    first, then = steer(tiny, domain(one)), steer(tiny, domain(two, "suppress"))
    after = Steering(first.activate).with_more(then.activate, then.deactivate)
    assert sets(steer(tiny, domain(one), domain(two, "suppress"))) == sets(after)


def test_an_expert_that_is_named_goes_before_every_report(tiny, tmp_path):
    path = report(tmp_path / "s.json", "safety", tiny, {(0, 5): 0.9, (0, 2): -0.4})
    wish = steer(tiny, safety(path), deactivate={1: (5,)})
    assert sets(wish) == ({}, {1: {2, 5}})
    assert wish.notices == [
        f"layer 1: experts [5] are deactivated as --deactivate asks, not activated as {path} does"
    ]
    assert wish.maps[0].cells == ((1, 2),), "the named one is not the report's"
    agreeing = steer(tiny, safety(path), activate={1: (5,)})
    assert sets(agreeing) == ({1: {5}}, {1: {2}})
    assert agreeing.maps[0].cells == ((1, 2),)
    listed = config(tmp_path, deactivate={"0": [5]})
    wish = steer(tiny, safety(path), config=listed)
    assert wish.notices == [
        f"layer 1: experts [5] are deactivated as {listed} asks, not activated as {path} does"
    ]


def test_a_limit_counts_what_is_steered_not_what_is_in_the_way(tiny, tmp_path):
    path = report(tmp_path / "d.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.4, (0, 1): 0.2})
    wish = steer(tiny, domain(path, most=1), deactivate={1: (5,)})
    assert sets(wish) == ({1: {2}}, {1: {5}})


def test_who_comes_later_is_served_first_where_the_router_is_full(tiny, tmp_path):
    one = report(tmp_path / "a.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.8})
    two = report(tmp_path / "b.json", "domain", tiny, {(0, 1): 0.1})
    wish = steer(tiny, domain(one), domain(two))
    assert sets(wish) == ({1: {1, 5}}, {})
    assert wish.notices == [
        f"layer 1: each token uses 2 experts; of those {one} names, the weakest, [2], are left out"
    ]
    named = steer(tiny, domain(one), domain(two), activate={1: (6, 7)})
    assert sets(named) == ({1: {6, 7}}, {})
    # Deactivating all of both would leave the router one expert; each alone is fine.
    one = report(tmp_path / "c.json", "domain", tiny, {(0, e): 0.5 for e in (0, 1, 2, 3)})
    two = report(tmp_path / "d.json", "domain", tiny, {(0, e): 0.1 * e for e in (4, 5, 6)})
    both = steer(tiny, domain(one, "suppress"), domain(two, "suppress"))
    assert sets(both) == ({}, {1: {0, 1, 2, 4, 5, 6}})
    check(Steering(both.activate, both.deactivate), tiny.resident)


def test_an_expert_of_two_reports_counts_once_for_the_router(tiny, tmp_path):
    one = report(tmp_path / "a.json", "domain", tiny, {(0, 5): 0.9, (0, 2): 0.8})
    two = report(tmp_path / "b.json", "domain", tiny, {(0, 2): 0.7, (0, 5): 0.6})
    wish = steer(tiny, domain(one), domain(two))
    assert sets(wish) == ({1: {2, 5}}, {})
    assert [use.cells for use in wish.maps] == [((1, 2), (1, 5))] * 2
    assert wish.notices == []


def test_lists_that_contradict_each_other_are_refused(tiny, tmp_path):
    listed = config(tmp_path, activate={"0": [5]})
    with pytest.raises(PlanError, match=r"experts \[5\] are asked to be both"):
        steer(tiny, config=listed, deactivate={1: (5,)})


def test_an_unknown_expert_beside_a_report_is_refused_by_name(tmp_path, rig):
    grouped = rig("deepseek_v3")
    path = report(tmp_path / "d.json", "domain", grouped, {(0, 5): 0.9})
    wish = steer(grouped, domain(path), activate={1: (77,)})
    with pytest.raises(PlanError, match="layer 1 has no expert 77"):
        check(Steering(wish.activate), grouped.resident)


def test_a_session_knows_which_reports_steer(tmp_path):
    session = Session.open("demo")
    shape = (len(session.anatomy.layers), session.anatomy.num_experts)
    paths = []
    for name, cells in (("a", ((2, 3), (4, 5))), ("b", ((4, 5), (5, 6)))):
        values = np.zeros(shape)
        values[tuple(zip(*cells, strict=True))] = 1.0
        found = Contrast(*[values] * 6, values > 0, values < 0, values != 0, None)
        paths.append(tmp_path / f"{name}.json")
        write_report(paths[-1], "domain", found, session.anatomy.indices, {"state": session.state})
    one, two = map(str, paths)

    def steered(**options):
        report = session.steer(SteerOptions(**options))
        return [(use.path, use.mode, use.cells) for use in report.maps]

    for _ in range(2):
        assert steered(maps=(domain(paths[0]),)) == [(one, "boost", ((2, 3), (4, 5)))]
    # The later report takes over what both name; an expert named by hand is nobody's.
    assert steered(maps=(domain(paths[1], "suppress"),)) == [
        (one, "boost", ((2, 3),)),
        (two, "suppress", ((4, 5), (5, 6))),
    ]
    assert steered(deactivate={2: (3,)}) == [(two, "suppress", ((4, 5), (5, 6)))]
    assert steered(maps=(domain(paths[1]),)) == [(two, "boost", ((4, 5), (5, 6)))]
    key = session.editor.steering.key
    by_hand = {"activate": {4: (5,), 5: (6,)}, "deactivate": {2: (3,)}}
    assert steered(clear=True, **by_hand) == []
    assert steered(maps=(domain(paths[0]),)) == [(one, "boost", ((2, 3),))], "4:5 was there before"
    assert steered(clear=True, **by_hand) == []
    assert session.editor.steering.key == key, "where steering is from changes nothing of it"
    session.close()


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
        ({"maps": (safety("s", "kind"),)}, "--safety-mode 'kind': choose one of safe, unsafe"),
        ({"maps": (domain("d", "up"),)}, "--domain-mode 'up': choose one of boost, suppress"),
        ({"rule": "hard"}, "--rule 'hard': choose one of steermoe, additive"),
        ({"maps": (ScanMap("d", "style", "up"),)}, "kind 'style': choose one of safety, domain"),
        ({"maps": (domain("d", most=0),)}, "--max-experts 0 must be at least 1"),
        ({"boost_value": -1.0}, "boost_value -1 must be above 0 and at most 10000"),
        ({"mask_value": 2.0}, "mask_value 2 must be below 0 and at least -1e\\+09"),
        ({"mask_value": float("-inf")}, "mask_value -inf must be below 0 and at least"),
        ({"mask_value": float("nan")}, "mask_value nan must be below 0 and at least"),
        ({"boost_value": 1e308}, "boost_value 1e\\+308 must be above 0 and at most 10000"),
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
    assert found.summary() == "steering: 1 forced on, 2 forced off, adding +2 and -3"
    assert session.state == state
    cleared = session.steer(SteerOptions(clear=True, boost_value=1.0))
    assert cleared.summary() == "no experts steered"
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
    options = SteerOptions(maps=(safety(path),))
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
