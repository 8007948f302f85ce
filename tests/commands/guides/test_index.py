"""The guides: every file is listed, no name hides a command, command pages point to them."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from commands.guides.index import GUIDES, guide_for, source
from commands.registry import COMMANDS, FAMILIES, help_text
from mlxfun.errors import UsageError
from tests.commands.conftest import Bench

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "commands" / "guides").glob("*.md"))


def test_the_list_and_the_files_agree() -> None:
    assert sorted(GUIDES) == [path.stem for path in FILES]


def test_the_files_are_part_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["commands"]
    for path in FILES:
        inside = path.relative_to(ROOT / "commands").as_posix()
        assert any(fnmatch(inside, pattern) for pattern in patterns)


def test_no_guide_has_the_name_of_a_command_or_of_a_family_of_them() -> None:
    names = {*COMMANDS, *FAMILIES, *(name.split()[0] for name in COMMANDS), "guides"}
    assert not names & set(GUIDES)


def test_every_command_points_to_one_guide_at_most_and_each_named_command_exists() -> None:
    named = [command for guide in GUIDES.values() for command in guide.commands]
    assert len(named) == len(set(named))
    assert set(named) <= set(COMMANDS)


def test_a_guide_names_the_commands_that_point_to_it() -> None:
    for guide in GUIDES.values():
        for command in guide.commands:
            assert command in source(guide.name), (guide.name, command)


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_shown_as_plain_text(name: str) -> None:
    page = help_text(name)
    title, _, body = source(name).partition("\n")
    assert page.splitlines()[0] == title.removeprefix("# ")
    for sign in ("```", "](", "<!--", "**", "|---", "\xa0"):
        assert sign not in page
    assert max(map(len, page.splitlines())) <= 78
    assert len(page) > len(body) / 2


def test_a_command_page_ends_with_the_guide_to_read_on() -> None:
    assert help_text("prune").startswith("Usage: prune [OPTIONS]")
    assert help_text("prune").endswith("\n\nKey p.\n\nMore in the guide: help pruning")
    assert help_text("merge").endswith("\n\nMore in the guide: help merging")
    assert help_text("help").endswith("Key f1.")
    assert guide_for("help") is None


@pytest.mark.parametrize("listing", ["guides", None])
def test_the_overview_and_the_list_of_guides_have_a_line_for_each(listing: str | None) -> None:
    lines = help_text(listing).splitlines()
    for guide in GUIDES.values():
        assert [
            line.split(None, 1)[1] for line in lines if line.startswith(f"  {guide.name} ")
        ] == [guide.summary]


def test_the_list_of_guides_fits_a_terminal() -> None:
    assert max(map(len, help_text("guides").splitlines())) <= 78


@pytest.mark.parametrize(
    ("word", "meant"),
    [("prunning", "pruning"), ("ablations", "ablation"), ("scan", "scans"), ("guide", "guides")],
)
def test_a_word_like_a_guide_suggests_it(word: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        help_text(word)
    assert str(caught.value) == (
        f"help: no command or guide is called {word!r}: did you mean {meant}?; type help for a list"
    )


def test_completion_of_help_offers_guides_behind_commands(bench: Bench) -> None:
    def texts(line: str) -> list[str]:
        return [c.text for c in bench.engine.complete(line)]

    assert texts("help pru") == ["prune", "pruning"]
    assert texts("help s")[-5:] == ["screen", "scans", "steering", "sessions", "serving"]
    assert set(GUIDES) | {"prune", "stats"} <= set(texts("help "))
    assert texts("help pruning ") == []
    hints = {c.text: c.hint for c in bench.engine.complete("help pru")}
    assert hints["pruning"] == GUIDES["pruning"].summary


def test_a_guide_is_a_report_with_the_text_of_its_page(bench: Bench) -> None:
    (ended,) = bench.do("help pruning")
    assert ended.report is not None
    assert ended.report.kind == "text"
    assert ended.report.data() == {"text": help_text("pruning")}
    assert bench.engine.help("pruning", 60) == help_text("pruning", width=60)
