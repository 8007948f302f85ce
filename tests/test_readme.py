"""README and guides tell the truth: what is generated is up to date, examples parse, code runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from commands import one_shot, reference
from commands.cli import shell
from commands.guides.index import GUIDES
from commands.reference import PARTS, updated
from commands.registry import COMMANDS, parse
from commands.scripts.recipe_file import read_recipe
from commands.scripts.replay import checked_script
from tests.documents import DOCUMENTS, KINDS, ROOMS, ROOT, Block, blocks, code_spans, shell_commands

README = (ROOT / "README.md").read_text("utf-8")
TABLE = (ROOT / "commands" / "guides" / "commands.md").read_text("utf-8")
BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
# Options of other programs that are shown.
FOREIGN = {"--hosts", "--over", "--output-hostfile", "--help", "--preset", "--check", "--write"}


def block_after(marker: str) -> str:
    """The fenced code block that follows `marker`."""
    return README.partition(marker)[2].partition("```python\n")[2].partition("```")[0]


def of_kind(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


@pytest.mark.parametrize("file", PARTS)
def test_the_generated_parts_are_up_to_date(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert updated(file, text) == text, "run python -m commands.reference --write"


def test_a_stale_table_is_noticed() -> None:
    stale = TABLE.replace("Drop the staged plan", "Keep the staged plan")
    assert stale != TABLE
    assert updated("commands/guides/commands.md", stale) == TABLE


@pytest.mark.parametrize("file", PARTS)
def test_a_file_without_markers_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match=rf"{file}: the markers .* are missing"):
        updated(file, "# mlxfun")


def test_check_names_what_is_stale_and_write_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in PARTS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text("utf-8"), "utf-8")
    for folder in ("mlxfun", "commands", "tui"):
        for path in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "tests").mkdir()
    (tmp_path / reference.WALK).write_bytes((ROOT / reference.WALK).read_bytes())
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    runner = CliRunner()
    assert runner.invoke(reference.main, ["--check"]).exit_code == 0

    (tmp_path / "tui" / "new.py").write_text('"""A new module."""\n', "utf-8")
    refused = runner.invoke(reference.main, ["--check"])
    assert refused.exit_code == 1
    assert "out of date: tui/README.md;" in refused.output
    assert runner.invoke(reference.main, ["--write"]).exit_code == 0
    assert re.search(r"\n  new +A new module\.\n", (tmp_path / "tui" / "README.md").read_text())
    assert runner.invoke(reference.main, ["--check"]).exit_code == 0


def test_every_command_is_in_the_table() -> None:
    table = TABLE.partition("<!-- commands: ")[2].partition("<!-- commands end -->")[0]
    for command in COMMANDS.values():
        assert f"| `{command.name}" in table


def test_every_module_is_in_the_tree_of_its_package() -> None:
    for readme in ROOMS:
        tree = readme.read_text("utf-8").partition("<!-- tree: ")[2]
        for path in readme.parent.rglob("*.py"):
            name = f"{path.parent.name}/" if path.stem == "__init__" else path.stem
            assert re.search(rf"\n *{re.escape(name)} +\S", tree), path


def layers_of(container: str) -> list[set[str]]:
    """The rooms of a package or folder in the import contract, from the top."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (found,) = (c for c in contracts if c.get("containers") == [container])
    return [set(layer.split(" | ")) for layer in found["layers"]]


@pytest.mark.parametrize("container", ["mlxfun", "mlxfun.techniques", "commands", "tui"])
def test_the_picture_of_the_rooms_is_that_of_the_import_contract(container: str) -> None:
    package, _, folder = container.partition(".")
    text = (ROOT / package / "README.md").read_text("utf-8")
    picture = text.partition("## Rooms\n")[2].partition("```\n")[2].partition("```")[0]
    margin = " {17}" if folder else ""
    drawn = [
        name
        for line in re.findall(rf"^{margin}((?:\w+, )*\w+)(?:  |$)", picture, re.MULTILINE)
        for name in line.split(", ")
    ]
    wanted = layers_of(container)
    assert sorted(drawn) == sorted(name for layer in wanted for name in layer)
    place = {name: number for number, layer in enumerate(wanted) for name in layer}
    assert [place[name] for name in drawn] == sorted(place[name] for name in drawn)


def test_the_quick_start_is_two_commands_and_the_second_is_what_ci_runs() -> None:
    assert "\n    pip install -e . && mlxfun-shell --demo\n" in README
    assert "\n    pip install -e '.[test]' && pytest\n" in README
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -e '.[test]'" in script
    assert "LD_PRELOAD=$preload pytest\n" in script


def test_the_front_page_is_short_and_leads_to_every_guide_and_room() -> None:
    assert len(README.splitlines()) <= 200
    for name in GUIDES:
        assert f"](commands/guides/{name}.md)" in README
    for readme in ROOMS:
        assert f"]({readme.relative_to(ROOT).as_posix()})" in README


@pytest.mark.parametrize("path", [*DOCUMENTS, *ROOMS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", [*DOCUMENTS, *ROOMS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_folders_in_running_text_exist(path: Path) -> None:
    for span in code_spans(path):
        if re.fullmatch(r"[a-z_.]+(/[a-z_0-9.]+)+/?", span):
            assert (ROOT / span).exists() or (path.parent / span).exists(), span


def test_the_library_example_runs(tmp_path: Path) -> None:
    code = block_after("<!-- library: run by a test -->")
    assert "session.undo()" in code
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned-demo" / "config.json").is_file()
    assert len(done.stdout.splitlines()) == 4


def test_every_block_says_what_it_is() -> None:
    assert {block.kind.split()[0] for block in BLOCKS} == KINDS
    assert len(of_kind("mlxfun")) > 20


@pytest.mark.parametrize(
    "block", of_kind("mlxfun", "mlxfun fragment", "mlxfun network"), ids=lambda b: b.where
)
def test_the_commands_in_a_block_parse(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "example"
    path.write_text(block.text + "\n", "utf-8")
    if block.text.startswith("#!mlxfun-recipe"):
        read_recipe(path, lambda line, _tried: (parse(line), None)[1])
    elif block.text.startswith("#!mlxfun-session"):
        checked_script(path, lambda line: parse(line).command)
    else:
        assert block.lines
        for line in block.lines:
            parse(line)


@pytest.mark.parametrize("block", of_kind("sh"), ids=lambda b: b.where)
def test_what_is_typed_in_a_terminal_parses(block: Block) -> None:
    for program, *words in shell_commands(block):
        if program == "mlxfun-shell" and (found := one_shot.named(words)) is not None:
            asked = one_shot.parse(*found, program)
            assert asked is not None
            for line in asked.lines:
                parse(line)
        elif program == "mlxfun-shell":
            given = shell.make_context("mlxfun-shell", list(words)).params
            for line in given["commands"]:
                parse(line)
        elif program == "python" and words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None
        elif program == "python":
            assert (ROOT / words[0]).is_file()
        else:
            assert program in {"pip", "pytest", "ruff", "mypy", "lint-imports", "curl", "export"}


def test_options_in_running_text_exist() -> None:
    programs = [shell, *(command.click for command in COMMANDS.values())]
    programs += [one_shot._click(row, name) for name, row in one_shot.TABLE.items()]
    known = {
        option
        for program in programs
        for parameter in program.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for path in (*DOCUMENTS, *ROOMS):
        for span in code_spans(path):
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
                assert option in known | FOREIGN, (path, span)


def test_commands_in_running_text_exist() -> None:
    for path in DOCUMENTS:
        for span in code_spans(path):
            if re.match("help [a-z]", span):
                assert parse(span).command.name == "help"
                name = span.removeprefix("help ")
                assert name in COMMANDS or name in GUIDES, (path.name, span)
