"""Long lines: parsed in time linear in them, quoted at most 200 characters, never multiplied."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import registry, words
from commands.completion import complete
from commands.scripts import recipe_file
from commands.scripts.expect import find, parse_expectation
from commands.workbench.session_file import read_script
from mlxfun.data.expert_notation import parse_expert_pairs, parse_experts
from mlxfun.errors import MlxfunError, UsageError
from mlxfun.session.reports import SessionView
from mlxfun.text import QUOTED, brief
from tests.commands.conftest import Bench

LENGTH = 400_000
"""What took minutes when parsing was quadratic in it."""


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab '\"\\\t\n\x0b\u00a0é#", max_size=30))
def test_words_are_those_of_a_posix_shell(line: str) -> None:
    def outcome(split: Any) -> Any:
        try:
            return split(line)
        except ValueError as problem:
            return str(problem)

    assert outcome(words.split) == outcome(shlex.split)


LINES = {
    "a word": "x" * LENGTH,
    "an option": "prune --" + "x" * LENGTH,
    "a number": "prune --n-prune " + "1" * LENGTH,
    "no number": "prune --n-prune " + "x " * LENGTH,
    "no number, quoted": "prune --n-prune '" + "x " * LENGTH + "'",
    "a choice": "prune --metric " + "x" * LENGTH,
    "text": "chat " + "word " * LENGTH,
    "quoted text": "chat '" + "word " * LENGTH + "'",
    "an open quote": "chat it's " + "x " * LENGTH,
    "an open quote in a command": "prune '" + "x" * LENGTH,
    "backslashes": 'chat "' + "\\" * LENGTH,
    "blanks": "undo" + " " * LENGTH + "x",
    "experts": "select --drop " + "3:1," * LENGTH + "3:1",
    "a long range": "select --drop 3:0.." + "9" * LENGTH,
    "many ranges": "select --drop " + "3:0..99999," * (LENGTH // 10) + "3:1",
    "dashes": "chat " + "-" * LENGTH,
    "more words": "undo " + "x " * LENGTH,
    "a family": "stats " + "x" * LENGTH,
    "help": "help " + "x" * LENGTH,
    "help words": "help " + "x " * LENGTH,
    "an expectation": "expect " + "x " * LENGTH,
    "a comparison": "expect a < " + " " * LENGTH + "x",
    "a setting": "set " + "x" * LENGTH,
    "a seed": "set seed " + "1" * LENGTH,
}


@pytest.mark.parametrize("name", LINES)
def test_a_long_line_is_parsed_and_what_is_wrong_with_it_is_short(name: str) -> None:
    assert len(wrong_with(LINES[name])) < QUOTED * 3
    complete(LINES[name][: LENGTH // 10], SessionView())


def wrong_with(line: str) -> str:
    """The sentence that refuses `line`, "" if it is valid."""
    try:
        registry.parse(line)
    except MlxfunError as problem:
        return str(problem)
    return ""


def test_a_long_line_of_a_replay_is_one_too(here: Path) -> None:
    (here / "s.mlxfun").write_text("set dataset " + "x" * LENGTH + "\n#= " + "y " * LENGTH + "\n")
    with pytest.raises(UsageError) as raised:
        read_script(here / "s.mlxfun")
    assert len(str(raised.value)) < QUOTED * 3


@pytest.mark.parametrize(
    "line",
    ["load {}", "chat --side base {}", "name {}", "replay {}", "stats load {}", "export chat {}.md",
     "recipe {}", "set dataset {}", "expect error {}", "expect a == {}", "save {}", "help {}"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["x" * 9000, "'" + "x " * 4500 + "'"], ids=["word", "words"])
def test_no_message_quotes_more_than_200_characters(bench: Bench, line: str, value: str) -> None:
    ended = bench.run(line.format(value))
    assert ended.error is None or len(ended.error) < QUOTED * 3


def test_every_message_of_a_job_is_cut() -> None:
    assert brief("a" * 300 + " is wrong") == "a" * 200 + "... is wrong"
    assert len(brief("a b " * 90000)) < 4100
    assert brief("short", "short") == "short"
    assert brief("'" + "a b " * 90 + "' is wrong", "a b " * 90) == (
        "'" + "a b " * 50 + "...' is wrong"
    )


# --- recipes ---------------------------------------------------------------------------------


def test_variants_are_counted_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_file, "product", lambda *_: pytest.fail("variants were made"))
    for line in ("{1,2}" * 40, "{" + "1," * 2000 + "1}", "{1,2}" + "x" * 9_000_000):
        with pytest.raises(ValueError, match="variants"):
            recipe_file.expand(line)


def test_all_lines_of_a_recipe_count(bench: Bench, here: Path) -> None:
    numbers = ",".join(map(str, range(1, 31)))
    (here / "s.recipe").write_text(
        f"at most 9 MB\ntry prune --n-prune {{{numbers}}} --min-experts-per-layer {{{numbers}}}\n"
        f"try prune --n-prune {{{numbers}}} --min-experts-per-layer {{1,2,3,4}}\n"
    )
    assert bench.run("recipe s.recipe").error == (
        "s.recipe:3: 120 variants are more than 1000, of which 100 are left"
    )


def test_long_lines_of_a_recipe_are_split_in_linear_time() -> None:
    assert len(recipe_file.expand("x" * LENGTH)) == 1
    assert len(recipe_file._THEN.split("a" + " " * LENGTH + "b")) == 1
    assert recipe_file._THEN.split("a  then   b then c") == ["a", "b", "c"]


# --- other texts -----------------------------------------------------------------------------


def test_no_short_text_names_millions_of_experts() -> None:
    with pytest.raises(UsageError, match=r"more than 1,000,000 experts"):
        parse_experts(",".join(["0..99999"] * 11))
    with pytest.raises(UsageError, match=r"more than 1,000,000 experts"):
        parse_expert_pairs(",".join(["3:0..99999"] * 11))
    with pytest.raises(UsageError, match=r"more than 1,000,000 experts"):
        registry.parse("steer --level " + ",".join(["3:0..99999=1"] * 11))
    assert len(parse_experts("0..99999")) == 100_000


def test_a_long_path_is_looked_up_by_the_keys_there_are() -> None:
    path = "a." + "b." * LENGTH
    with pytest.raises(KeyError):
        find({"a": {"b": {"b.b": 1}}}, path)
    with pytest.raises(KeyError):
        find({"a": [1]}, "a." + "1" * 5000)
    assert find({"a": {"b.c": [{"d": 5}]}}, "a.b.c.0.d") == 5
    assert parse_expectation("a.b <=   3").value == "3"
