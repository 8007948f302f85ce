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
from tui.app import ShellApp, check_config
from tui.lines import LineHistory

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
