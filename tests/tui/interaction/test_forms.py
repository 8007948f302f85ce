"""Forms of commands, the list of forms, and the list of models, driven by keys."""

from __future__ import annotations

from dataclasses import replace

from textual import events

from mlxfun.steering.reports import SteerReport
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tui.palette import items
from tui.widgets.dialogs.form import FormScreen
from tui.widgets.dialogs.leaving import LeaveScreen
from tui.widgets.dialogs.line_search import LineSearch
from tui.widgets.dialogs.pick import PickScreen


def choose(shell: Shell, command: str) -> None:
    """An entry of the palette."""
    item = next(i for i in items(shell.app.state) if i.command == command)
    shell.app.choose(item)


def form_at(shell: Shell) -> FormScreen:
    assert isinstance(shell.app.screen, FormScreen)
    return shell.app.screen


async def type_in(shell: Shell, text: str) -> None:
    names = {" ": "space", "-": "minus", ".": "full_stop", ":": "colon", "/": "slash"}
    await shell.press(*(names.get(letter, letter) for letter in text))


def test_a_form_makes_the_line_below_it_and_enter_runs_it() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        choose(shell, "save")
        await shell.settle()
        assert form_at(shell).line == "save out"  # what the key offers
        await shell.press("ctrl+u")
        await type_in(shell, "my dir")
        assert form_at(shell).made.value == "save 'my dir'"
        await shell.press("down", "space")
        assert form_at(shell).made.value == "save 'my dir' --force"
        await shell.press("enter")
        assert shell.engine.lines[-1] == "save 'my dir' --force"

    drive(test)


def test_the_line_below_can_be_edited_and_the_fields_follow() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.open_form("prune --n-prune 4")
        await shell.settle()
        form = form_at(shell)
        await shell.press("up")
        assert form.focused is form.made
        await type_in(shell, " --metric reap")
        rows = {row.field.name: row.input.value for row in form._rows}
        assert (rows["n_prune"], rows["metric"]) == ("4", "reap")
        await shell.press("escape")
        assert shell.engine.lines[-1] != form.line

    drive(test)


def test_errors_stand_at_the_field_and_nothing_runs() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        before = list(shell.engine.lines)
        shell.app.open_form("prune --n-prune x")
        await shell.settle()
        assert "'x' is not a valid integer" in shell.screen
        await shell.press("enter")
        form = form_at(shell)
        row = next(row for row in form._rows if row.field.name == "n_prune")
        assert form.focused is row.input
        assert shell.engine.lines == before
        await shell.press("backspace", "4", "enter")
        assert shell.engine.lines[len(before) :] == ["prune --n-prune 4"]

    drive(test)


def test_a_form_is_prefilled_with_the_last_use_and_completes() -> None:
    @ready(*CALIBRATED, "prune --n-prune 2")
    async def test(shell: Shell) -> None:
        await shell.press("f4")
        assert isinstance(shell.app.screen, PickScreen)
        await type_in(shell, "prune stage")
        await shell.press("enter")
        form = form_at(shell)
        assert form.line == "prune --n-prune 2"
        row = next(row for row in form._rows if row.field.name == "metric")
        form.set_focus(row.input)
        await type_in(shell, "reap_s")
        await shell.press("tab")
        assert form.line == "prune --n-prune 2 --metric reap_sum"

    drive(test)


def test_the_form_of_a_typed_line_and_of_one_that_failed() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("colon")
        await type_in(shell, "collect --dataset demo:eval")
        await shell.press("f4")
        assert form_at(shell).line == "collect --dataset demo:eval"
        await shell.press("escape")
        shell.app.main.leave_field()
        # The fake engine knows no merge, and says so; the form comes back with the reason.
        shell.app.open_form("merge --n-prune 2 --dataset demo:mixed")
        await shell.settle()
        await shell.press("enter")
        shell.engine.finish()
        await shell.settle()
        assert form_at(shell).line == "merge --n-prune 2 --dataset demo:mixed"
        assert "unknown command 'merge'" in shell.screen

    drive(test, size=(120, 50))


def test_load_alone_lists_models_with_what_they_take_and_enter_loads_one() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("colon")
        await type_in(shell, "load")
        await shell.press("enter")
        shell.engine.finish()
        await shell.settle()
        assert isinstance(shell.app.screen, PickScreen)
        assert "fits whole" in shell.screen
        assert "its headers cannot be read" in shell.screen
        await type_in(shell, "large")
        assert "takes 90.0 GiB of the 8.0 GiB that it may have" in shell.screen
        steering = SteerReport({0: (1,)}, {})
        shell.app.state = replace(
            shell.app.state, view=replace(shell.app.state.view, steering=steering)
        )
        await shell.press("enter")
        assert isinstance(shell.app.screen, LeaveScreen)  # steering would be lost
        await shell.press("enter")
        assert shell.engine.lines[-1] == "load '/models/large one' --resident auto"

    drive(test)


def test_letters_behind_the_key_that_opens_a_window_are_typed_there() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.main.command.input.remember("prune --n-prune 7")
        for key in ("ctrl+r", "n", "7"):
            character = key if len(key) == 1 else None
            shell.app.post_message(events.Key(key, character))
        await shell.settle()
        assert isinstance(shell.app.screen, LineSearch)
        assert shell.app.focused is not None
        assert shell.app.focused.value == "n7"  # type: ignore[attr-defined]

    drive(test)


def test_fields_scroll_and_the_line_below_them_stays_in_sight() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.open_form("merge --n-prune 2")
        await shell.settle()
        form = form_at(shell)
        assert form.made.region.bottom < 18
        await shell.press("up", "up")
        assert shell.app.focused is form._rows[-1].input
        assert form.screen.region.contains_region(form._rows[-1].input.region)
        assert ": merge --n-prune 2" in shell.screen

    drive(test, size=(60, 18))


def test_a_long_list_scrolls_and_its_field_stays_in_sight() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("f4")
        screen = shell.app.screen
        assert isinstance(screen, PickScreen)
        assert screen.query_one("PickInput").region.bottom < 18
        await shell.press("pagedown", "pagedown")
        assert screen.query_one("OptionList").highlighted == 16  # type: ignore[attr-defined]

    drive(test, size=(60, 18))


def test_what_is_typed_replaces_a_value_that_was_there() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        shell.app.open_form("prune --n-prune 4 --metric reap")
        await shell.settle()
        await type_in(shell, "8")
        assert form_at(shell).line == "prune --n-prune 8 --metric reap"
        await shell.press("down", "end")
        await type_in(shell, "_sum")
        assert form_at(shell).line == "prune --n-prune 8 --metric reap_sum"

    drive(test)
