"""What can be done now, and what leads on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from commands.registry import parse
from mlxfun.steering.reports import SteerReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED
from tui import hints
from tui.keys.key_labels import USUAL
from tui.keys.keymap import BY_ID, KEYS, keys_for
from tui.state.app_state import AppState


def state_after(*lines: str) -> AppState:
    engine = FakeEngine()
    engine.play(*lines)
    return AppState(view=engine.view(), rows=engine.rows(), lines=lines)


def test_without_a_model_the_first_step_is_to_load_one() -> None:
    assert "load demo" in hints.next_step(AppState())


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        (("load demo",), "collect"),
        (("load demo", *CALIBRATED), "prune"),
        (("load demo", *STAGED), "preview"),
        (("load demo", *STAGED, "preview"), "apply"),
        (("load demo", *APPLIED), "save"),
    ],
)
def test_every_stage_of_the_main_job_has_a_next_key_and_says_so(
    lines: tuple[str, ...], key: str
) -> None:
    state = state_after(*lines)
    assert hints.next_key(state) == key
    assert USUAL[key] in hints.next_step(state).replace(".", " ").replace(":", " ").split()
    assert hints.why_not(state, BY_ID[key]) == ""
    bar = hints.for_bar(state, "experts", 80)
    assert (bar[0].key, bar[0].applies, bar[0].leads) == (key, True, True)


def test_keys_that_do_nothing_say_why() -> None:
    state = state_after("load demo")
    assert hints.why_not(state, BY_ID["apply"]) == "nothing is staged: prune --n-prune 4"
    assert "press c" in hints.why_not(state, BY_ID["prune"])
    assert hints.why_not(AppState(), BY_ID["collect"]) == "still starting"


@pytest.mark.parametrize("room", [20, 58, 78, 118, 198])
def test_the_key_bar_fits_and_always_offers_help_and_the_command_line(room: int) -> None:
    bar = hints.for_bar(state_after("load demo", *STAGED), "experts", room)
    assert sum(hint.width for hint in bar) <= max(room, 20)
    assert [hint.key for hint in bar[-2:]] == ["command", "help"]


def test_at_80_columns_a_staged_plan_shows_all_that_can_be_done_with_it() -> None:
    bar = hints.for_bar(state_after("load demo", *STAGED), "plan", 78)
    assert {"preview", "apply", "discard", "flip"} <= {hint.key for hint in bar}


@pytest.mark.parametrize(("panel", "leads"), [("command", "enter run"), ("chat", "enter send")])
@pytest.mark.parametrize("lines", [(), STAGED])
def test_in_a_text_field_no_letter_is_offered_as_a_key(
    lines: tuple[str, ...], panel: str, leads: str
) -> None:
    bar = hints.for_bar(state_after("load demo", *lines), panel, 118, typing=True)
    assert f"{bar[0].sign} {bar[0].label}" == leads
    assert all(len(hint.sign) > 1 or hint.sign == "↑" for hint in bar), bar
    assert {"escape", "help", "palette", "to_map"} <= {hint.key for hint in bar}
    assert all(key.scope == "always" for key in keys_for("command"))


def test_in_a_layer_the_bar_leads_on_to_the_expert_and_back_to_the_map() -> None:
    state = state_after("load demo", *STAGED)
    state = replace(state, heat=replace(state.heat, shape="layer"))
    bar = hints.for_bar(state, "experts", 58)
    assert [(hint.sign, hint.label) for hint in bar[:2]] == [("enter", "dossier"), ("esc", "back")]


def test_prefilled_lines_suggest_a_quarter_of_the_experts_and_then_the_last_line() -> None:
    state = state_after("load demo", *CALIBRATED)
    assert hints.command_line(state, BY_ID["prune"]) == "prune --n-prune 4"
    again = state_after("load demo", *CALIBRATED, "prune --n-prune 2")
    assert hints.command_line(again, BY_ID["prune"]) == "prune --n-prune 2"


@pytest.mark.parametrize(
    ("way", "line"),
    [
        ("up", "steer --clear --activate 0:1,2:5 --deactivate 3:3"),
        ("down", "steer --clear --activate 0:1 --deactivate 2:5,3:3"),
        ("off", "steer --clear --activate 0:1 --deactivate 3:3"),
    ],
)
def test_steering_one_expert_keeps_the_rest(way: str, line: str) -> None:
    report = SteerReport({0: (1,)}, {3: (3,)})
    assert hints.steer_line(report, 2, 5, way) == line


def test_an_expert_changes_sides_rather_than_being_steered_both_ways() -> None:
    assert hints.steer_line(SteerReport({2: (5,)}, {}), 2, 5, "down") == (
        "steer --clear --deactivate 2:5"
    )
    assert hints.steer_line(SteerReport({2: (5,)}, {}), 2, 5, "off") == "steer --clear"


def test_every_key_has_words_and_a_unique_id() -> None:
    assert len({key.id for key in KEYS}) == len(KEYS)
    assert all(key.help and key.label for key in KEYS)


def test_no_two_keys_of_one_place_are_the_same() -> None:
    for scope in {scope for key in KEYS for scope in key.scope.split(",")}:
        here = [key for key in KEYS if any(map(key.works_in, (scope, "app", "always")))]
        keys = [name for key in here for name in key.keys.split(",")]
        assert len(keys) == len(set(keys)), scope


def test_a_plan_that_costs_a_lot_of_quality_is_not_recommended() -> None:
    state = state_after("load demo", *STAGED, "preview")
    assert hints.next_key(state) == "apply"
    scores = state.view.scores
    assert scores is not None
    bad = replace(scores, perplexity={"all": 2.5 * scores.baseline["all"]})
    state = replace(state, view=replace(state.view, scores=bad))
    assert hints.next_key(state) == "discard"
    assert "p stages a smaller prune" in hints.next_step(state)


def test_a_key_keeps_the_rule_that_is_in_force() -> None:
    report = SteerReport({2: (5,)}, {}, (), "additive", 1.5, -10000.0)
    line = hints.steer_line(report, 2, 6, "down")
    assert line == (
        "steer --clear --activate 2:5 --deactivate 2:6 "
        "--rule additive --boost-value 1.5 --mask-value -10000"
    )
    assert parse(line).params["mask_value"] == -10000.0
    assert hints.steer_line(report, 2, 5, "off") == "steer --clear"
