"""The user's configuration: what it may say, and the file and line of what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands.config import read_config
from mlxfun.errors import UsageError

WHOLE = """\
theme = "mlxfun-light"
refresh_rate = 10
undo_budget = "2GiB"
keep_sessions = false

[defaults]
metric = "freq"
max-tokens = 512

[keys]
apply = "ctrl+a"
discard = ""
"""


def test_all_that_it_may_say_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(WHOLE)
    config = read_config(path)
    assert (config.theme, config.refresh_rate, config.keep_sessions) == ("mlxfun-light", 10, False)
    assert config.undo_budget == 2 << 30
    assert config.defaults == {"metric": "freq", "max-tokens": 512}
    assert config.keys == {"apply": "ctrl+a", "discard": ""}


def test_without_a_file_of_the_user_everything_is_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config()
    assert (config.theme, config.defaults, config.keep_sessions) == (None, {}, True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('\ntheme = "x\n', "config.toml:2: "),
        ("theme = 3\n", "config.toml:1: theme: 3 is not a text"),
        ('\n\ncolour = "x"\n', "config.toml:3: colour: unknown; known are theme, refresh_rate, "),
        ("refresh_rate = 1000\n", "config.toml:1: refresh_rate: 1000 is not a number of frames"),
        ("refresh_rate = true\n", "config.toml:1: refresh_rate: True is not a number"),
        ('undo_budget = "lots"\n', "config.toml:1: undo_budget: 'lots' is not a size"),
        ("[defaults]\n\nmetric = 'best'\n", "config.toml:3: defaults.metric: 'best' is not one of"),
        ("[defaults]\nmetrics = 'freq'\n", "config.toml:2: defaults.metrics: unknown; known are"),
        ("keys = 3\n", "config.toml:1: keys: 3 is not a table: begin it with [keys]"),
        ("[keys]\n'apply' = 3\n", "keys.apply: 3 is not a text"),
        ("keep_sessions = 1\n", "config.toml:1: keep_sessions: 1 is not true or false"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert wanted in str(caught.value)


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("undo_budget = " + "9" * 5000, "thousands of digits"),
     ("theme = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
     ("theme = 0x" + "f" * 20000, "a very long int is not a text"),
     ("'" + "k" * 5000 + "' = 1", "unknown; known are")],
    ids=["digits", "brackets", "hexadecimal", "name"],
)  # fmt: skip
def test_values_that_python_cannot_hold_are_a_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        read_config(tmp_path / "c.toml")
    assert len(str(raised.value)) < 700
