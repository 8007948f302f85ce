"""The keys that commands declare are the keys that the screen binds."""

from __future__ import annotations

import pytest

from commands.registry import COMMANDS
from tui.keys.keymap import BY_ID

DECLARED = {name: command.key for name, command in COMMANDS.items() if command.key}


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_declared_key_is_bound_to_its_command(name: str) -> None:
    assert DECLARED[name] in BY_ID[name].keys.split(",")


def test_no_key_of_the_screen_belongs_to_another_command() -> None:
    for name, key in DECLARED.items():
        others = [k.id for k in BY_ID.values() if key in k.keys.split(",") and k.id != name]
        assert others == [], f"{key} of {name}"
