"""The user's theme and keys on the screen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands.config import Config
from mlxfun.errors import UsageError
from tests.fake_engine import FakeEngine
from tests.tui.driving import Shell
from tui.app import ShellApp
from tui.command_history import LineHistory
from tui.config_check import check_config

PATH = Path("config.toml")


def config(theme: str | None = None, **keys: str) -> Config:
    lines: Mapping[str, int] = {"theme": 1, **{f"keys.{name}": 4 for name in keys}}
    return Config(PATH, theme=theme, keys=keys, lines=lines)


def test_a_theme_that_there_is_not_is_named_with_its_line() -> None:
    with pytest.raises(UsageError) as caught:
        check_config(config("pink"))
    assert str(caught.value).startswith(
        "config.toml:1: theme: 'pink' is unknown; known are mlxfun-"
    )


def test_a_key_that_there_is_not_is_named_with_its_line() -> None:
    with pytest.raises(
        UsageError, match=r"config\.toml:4: keys\.aply: unknown; known are collect, "
    ):
        check_config(config(aply="f9"))


def test_one_key_cannot_mean_two_things() -> None:
    with pytest.raises(
        UsageError, match=r"config\.toml:4: keys\.apply: u is the key of undo already"
    ):
        check_config(config(apply="u"))
    check_config(config(apply="u", undo="f9"))
    # However it is written.
    with pytest.raises(UsageError, match=r"keys\.apply: right_square_bracket is the key of pick_m"):
        check_config(config(apply="]"))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"apply": "ctl+a"}, "keys.apply: 'ctl+a' is no key: it is a character or the name of one"),
        ({"apply": "f9,shift+a"}, "keys.apply: 'shift+a' types a character of its own"),
        ({"palette": ""}, "keys.palette: it needs a key: what has none is reached by it"),
        ({"help": "h"}, "keys.help: h is for typing, and this key works in text fields too"),
        ({"escape": "tab"}, "keys.escape: tab is for typing, and this key works in text fields"),
    ],
)
def test_what_cannot_be_a_key_is_named_with_its_line(keys: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(config(**keys))
    assert str(caught.value).startswith(f"config.toml:4: {problem}")


def test_keys_can_be_taken_away_given_twice_and_exchanged() -> None:
    check_config(config(apply="", undo=""))
    check_config(config(apply="f9, ctrl+a"))
    check_config(config(apply="u", undo="a"))


def test_the_users_key_works_and_the_old_one_does_not() -> None:
    engine = FakeEngine()

    async def body() -> None:
        app = ShellApp(
            engine,
            startup_lines=["load demo"],
            lines=LineHistory(None),
            config=config("mlxfun-light", info="f9"),
        )
        async with app.run_test() as pilot:
            shell = Shell(engine, app, pilot)
            await shell.settle()
            engine.finish()
            await shell.settle()
            assert app.theme == "mlxfun-light"
            await shell.press("n")
            assert engine.lines == ["load demo"]
            await shell.press("f9")
            assert engine.lines == ["load demo", "info"]

    asyncio.run(body())
