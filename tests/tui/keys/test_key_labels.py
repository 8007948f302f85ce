"""What the screen says of keys is true of the user's keys, whichever they are."""

from __future__ import annotations

import re

import pytest

from tests.tui.driving import STAGED, Shell, drive, ready
from tests.tui.keys.strange_keys import PAGE, STRANGE, page_of
from tests.tui.keys.test_keymap import RUN_LINES, Willing, home
from tui import hints as guide
from tui import palette
from tui.keys.key_labels import ESSENTIAL, USUAL, KeyNames, canonical, parsed, why_not, written
from tui.keys.keymap import KEYS
from tui.state.app_state import AppState, Job
from tui.widgets.command_line import one_line


# Keys of the user, at work ------------------------------------------------------------------------
def test_renamed_keys_are_named_and_work_and_the_old_ones_do_nothing() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert "Press ^g to calibrate" in shell.screen
        assert "^g calibrate" in shell.screen
        before = list(shell.engine.lines)
        await shell.press("c")
        assert not shell.app.main.in_field
        await shell.press("ctrl+g")
        assert shell.app.main.command.input.value == "collect --dataset demo:mixed"
        await shell.press("enter")
        await shell.play(*STAGED[1:], "preview")
        assert "Press F9 to apply" in guide.next_step(shell.app.state)
        assert "F9 apply" in shell.screen
        await shell.press("a")
        assert "apply" not in shell.engine.lines
        await shell.press("f9")
        assert shell.engine.lines[len(before) :][-1] == "apply"

    drive(test, keys={"apply": "f9,ctrl+a", "collect": "ctrl+g"})


def test_every_renamed_key_of_a_command_works_and_none_of_the_old_ones() -> None:
    @ready(*STAGED, "apply", "undo", "chat hello")
    async def test(shell: Shell) -> None:
        for key in (key for key in KEYS if key.kind == "run"):
            await home(shell, key)
            before = len(shell.engine.lines)
            await shell.press(*key.keys.split(","))
            assert shell.engine.lines[before:] == [], key.id
            await shell.press(STRANGE[key.id])
            assert shell.engine.lines[before:] == [RUN_LINES[key.id]], key.id

    drive(test, engine=Willing(), keys=STRANGE)


def test_brackets_as_keys_are_no_markup() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert str(shell.app.main.query_one("#welcome").visual).startswith("Press [ and ask")
        assert "Press ] on an expert" in str(shell.app.main.query_one("#unsteered").visual)
        await shell.press("f1")
        assert "[  talk to the live model" in page_of(shell)
        assert "]  add this expert to" in page_of(shell)

    drive(test, keys={"chat": "[", "mix": "]", "pick_more": "f8", "pick_fewer": "f9"})


def test_textuals_own_keys_move_along() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert shell.engine.lines[-1] == "apply"
        main = shell.app.screen
        await shell.press("ctrl+p")
        assert shell.app.screen is main
        await shell.press("f8")
        assert shell.app.screen is not main
        await shell.press("escape", "f9")
        assert shell.app.screen is not main  # F9 opens the help ...
        await shell.press("f9")
        assert shell.app.screen is main  # ... and closes it
        await shell.press("ctrl+c")
        assert shell.echo == "· F11 cancels, F10 leaves"
        await shell.press("f10")
        assert "F10 quit anyway" in shell.screen
        await shell.press("f10")

    keys = {"apply": "ctrl+q", "quit": "f10", "palette": "f8", "help": "f9", "interrupt": "f11"}
    shell = drive(test, keys=keys, engine=Willing())
    assert shell.app.return_code == 0


# No key at all ------------------------------------------------------------------------------------
BARE = {"apply": "", "pick": "", "panel_plan": "", "plan_save": "", "new_chat": "", "goto": ""}


def test_a_key_that_was_taken_away_does_nothing_and_its_command_is_named() -> None:
    @ready(*STAGED, "preview")
    async def test(shell: Shell) -> None:
        said = guide.next_step(shell.app.state)
        assert said.startswith("Measured. Press :apply to apply, d to discard")
        bar = str(shell.app.main.query_one("#keys").visual)
        assert " apply" not in bar
        assert "  d discard  " in bar
        await shell.press("a", "3")
        assert "apply" not in shell.engine.lines
        plan = shell.app.main.panel_named("plan")
        assert plan is not None
        assert str(plan.border_title) == "staged plan"
        await shell.press("f1")
        assert ":apply  apply the staged plan" in page_of(shell)

    drive(test, keys=BARE)


def test_what_has_no_key_is_called_by_what_leads_to_it() -> None:
    names = KeyNames.of(BARE)
    called = {id: names[id] for id in BARE}
    assert called == {
        "apply": ":apply",
        "pick": "^p select",
        "panel_plan": "^p plan",
        "plan_save": ":plan save",
        "new_chat": ":chat --new",
        "goto": ":goto",
    }
    assert KeyNames.of({**BARE, "command": "f4", "palette": "f5"})["apply"] == "F4 apply"
    item = next(i for i in palette.items(AppState(names=names)) if i.key == "apply")
    assert item.title == "apply"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.id)
def test_every_key_can_be_taken_away_but_those_that_lead_to_the_others(key: object) -> None:
    assert isinstance(key, type(KEYS[0]))
    assert bool(why_not(key.id, "")) == (key.id in ESSENTIAL)
    if key.id not in ESSENTIAL:
        names = KeyNames.of({key.id: ""})
        assert names[key.id].startswith((":", "^p "))
        assert len(names[key.id]) > len("^p ")


# Names of keys ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "name", "shown"),
    [
        ("a", "a", "a"),
        ("A", "A", "A"),
        ("+", "plus", "+"),
        ("plus", "plus", "+"),
        ("]", "right_square_bracket", "]"),
        (",", "comma", ","),
        ("é", "é", "é"),
        ("ctrl+r", "ctrl+r", "^r"),
        ("Ctrl+R", "ctrl+r", "^r"),
        ("ctrl+]", "ctrl+right_square_bracket", "^]"),
        ("ctrl+left", "ctrl+left", "ctrl+←"),
        ("shift+ctrl+left", "ctrl+shift+left", "ctrl+shift+←"),
        ("alt+X", "alt+shift+x", "alt+shift+x"),
        ("f12", "f12", "F12"),
        ("pageup", "pageup", "page up"),
        ("esc", "escape", "esc"),
        ("ctrl+m", "enter", "enter"),
        ("ctrl+space", "ctrl+@", "^space"),
    ],
)
def test_a_key_is_bound_as_a_terminal_sends_it_and_written_as_a_person_does(
    given: str, name: str, shown: str
) -> None:
    assert parsed(given) == (name,)
    assert written(name) == shown


@pytest.mark.parametrize("given", ["ctl+a", "foo", "f99", "ctrl+", "shift+a", "ab", "\t"])
def test_what_is_no_key_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(given))):
        canonical(given)


def test_the_keys_as_they_come_need_no_other_binding() -> None:
    assert USUAL.bindings() == {}
    assert KeyNames.of({"apply": " a "}).bindings() == {}
    assert KeyNames.of({"apply": "f9, +", "undo": ""}).bindings() == {
        "apply": "f9,plus",
        "undo": "no_key_for_undo",
    }


# Words from outside -------------------------------------------------------------------------------
def test_words_from_outside_keep_their_braces() -> None:
    assert one_line(PAGE, USUAL) == "save {apply}: see the reports (5)"
    loading = AppState(jobs=(Job(1, "load {apply}", 0.0),))
    assert guide.next_step(loading) == "load {apply}: starting ..."

    @ready("chat 'What is {apply}?'", "name 0 {collect}")
    async def test(shell: Shell) -> None:
        assert "What is {apply}?" in shell.screen
        assert "{collect}" in shell.screen

    drive(test)
