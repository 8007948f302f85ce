"""The screen against the real registry: nothing is out of reach, no key means two things."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import reference, registry
from commands.engine import Engine
from mlxfun.session.reports import SessionView
from tests.tui.driving import Shell
from tui import hints, palette
from tui.app import ShellApp
from tui.keys.keymap import BY_ID, KEYS
from tui.state.app_state import AppState

ROOT = Path(__file__).resolve().parents[2]
ROWS = registry.rows(SessionView())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_command_is_in_the_palette(row: registry.Row) -> None:
    assert row.name in {item.command for item in palette.items(AppState(rows=ROWS))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_command_is_reached_from_line_palette_and_headless(row: registry.Row) -> None:
    example = reference.examples(ROOT)[row.name]
    assert registry.parse(example).command.name == row.name  # what is typed, and what -c takes
    assert registry.parse(f"{row.name} --help").params == {"name": tuple(row.name.split())} or (
        registry.COMMANDS[row.name].tail
    )
    entry = next(item for item in palette.items(AppState(rows=ROWS)) if item.command == row.name)
    if entry.key is None:
        return
    key = BY_ID[entry.key]
    assert key.kind == "do" or registry.parse(hints.command_line(AppState(rows=ROWS), key, node=0))


@pytest.mark.parametrize("row", [r for r in ROWS if r.key], ids=lambda row: row.name)
def test_a_command_has_the_key_that_it_declares(row: registry.Row) -> None:
    bound = [key for key in KEYS if row.key in key.keys.split(",")]
    assert len(bound) == 1
    if bound[0].kind != "do" or hints.command_of(bound[0]) is not None:
        assert hints.command_of(bound[0]) == row.name
    else:
        assert bound[0].id == row.name


def test_what_keys_run_or_offer_are_lines_that_parse() -> None:
    state = AppState(rows=ROWS)
    for key in KEYS:
        if key.kind != "do":
            line = hints.command_line(state, key, node=0)
            assert registry.parse(line).command.name == hints.command_of(key)


def test_a_chat_text_of_any_shape_parses_back_to_itself() -> None:
    from tui.input.chat_actions import line_for

    for text in ("--new", "it's", "a  b", "-", '"', "--n-prune 4 experts"):
        parsed = registry.parse(line_for(AppState(), text))
        assert " ".join(parsed.params["text"]) == text


def test_without_a_model_the_real_engine_explains_itself_on_the_screen() -> None:
    import asyncio

    async def run() -> list[str]:
        engine = Engine()
        app = ShellApp(engine)
        async with app.run_test(size=(80, 24)) as pilot:
            shell = Shell(engine, app, pilot)  # type: ignore[arg-type]
            await shell.press("c")
            said = [shell.echo]
            await shell.press("colon", *"colect", "enter")
            said += [app.state.log[-1].text, app.main.command.input.value]
        engine.close()
        return said

    assert asyncio.run(run()) == [
        "! calibrate: no model is loaded: type load PATH, or load demo",
        "unknown command 'colect': did you mean collect?; type help for a list",
        "colect",
    ]
