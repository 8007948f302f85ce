"""Rules of the code that no linter checks, read off the source of the three packages and the tests."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlxfun", "commands", "tui")
LONGEST_FILE, LONGEST_FUNCTION, LARGEST_FOLDER, LONGEST_REPEAT = 400, 50, 16, 10

FIXED = {
    "action", "alignment", "beside", "budget", "combined", "component", "feed_forward",
    "finish_reason", "front", "group", "kind", "level", "live", "mode", "domain_mode",
    "safety_mode", "operator", "panel", "position", "role", "router_kind", "rule", "scope", "score",
    "shape", "side", "similarity_mode", "status", "upper", "way",
}  # fmt: skip
"""Fields of these names hold one of a few values, so their type lists them."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def fields_of(tree: ast.Module) -> Iterator[tuple[str, ast.AnnAssign]]:
    for made in ast.walk(tree):
        if isinstance(made, ast.ClassDef):
            for line in made.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield f"{made.name}.{line.target.id}", line


def test_roles_sides_and_modes_are_types_that_list_their_values() -> None:
    seen, plain = set(), []
    for path in sources(*PACKAGES):
        for name, line in fields_of(parsed(path)):
            field = name.rpartition(".")[2]
            if field in FIXED and "str" in ast.unparse(line.annotation).split(" | "):
                plain.append(f"{path.relative_to(ROOT)}:{line.lineno} {name}")
            seen.add(field)
    assert not plain
    assert seen >= FIXED  # a name that is gone is no longer checked


def test_no_parameter_hides_a_model_or_a_tokenizer() -> None:
    hidden, seen = [], 0
    for path in sources(*PACKAGES):
        for made in ast.walk(parsed(path)):
            if isinstance(made, ast.arg) and made.arg in ("model", "tokenizer") and made.annotation:
                seen += 1
                if ast.unparse(made.annotation) == "Any":
                    hidden.append(f"{path.relative_to(ROOT)}:{made.lineno} {made.arg}")
    assert hidden == []
    assert seen > 100


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_and_functions_fit_on_a_few_screens(folder: str) -> None:
    long = []
    for path in sources(folder):
        lines = len(path.read_text("utf-8").splitlines())
        if lines > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for made in ast.walk(parsed(path)):
            if isinstance(made, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (made.end_lineno or 0) - made.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(
                        f"{path.relative_to(ROOT)}:{made.lineno} {made.name}: {lines} lines"
                    )
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_hold_few_modules(package: str) -> None:
    count: dict[str, int] = {}
    for path in sources(package):
        if path.stem != "__init__":
            folder = str(path.parent.relative_to(ROOT))
            count[folder] = count.get(folder, 0) + 1
    assert {folder: n for folder, n in count.items() if n > LARGEST_FOLDER} == {}


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) without imports, docstrings, comments and closing brackets."""
    left_out = set[int]()
    for made in ast.walk(parsed(path)):
        words = isinstance(made, ast.Expr) and isinstance(made.value, ast.Constant)
        if words or isinstance(made, ast.Import | ast.ImportFrom):
            left_out.update(range(made.lineno, (made.end_lineno or made.lineno) + 1))
    lines = enumerate(map(str.strip, path.read_text("utf-8").splitlines()), 1)
    return [(n, ln) for n, ln in lines if n not in left_out and ln.strip(")}]:,") and ln[0] != "#"]


def test_no_ten_lines_stand_in_two_places() -> None:
    places: dict[tuple[str, ...], list[str]] = {}
    for path in sources(*PACKAGES):
        lines = code_lines(path)
        for start in range(len(lines) - LONGEST_REPEAT + 1):
            block = tuple(line for _, line in lines[start : start + LONGEST_REPEAT])
            place = f"{path.relative_to(ROOT)}:{lines[start][0]}"
            places.setdefault(block, []).append(place)
    assert len(places) > 10_000
    assert [found for found in places.values() if len(found) > 1] == []


@pytest.mark.parametrize(
    ("what", "places"),
    [
        (r"^def decoder_layers\(", {"mlxfun/model/anatomy/layers.py"}),
        (r"^def discover\(", {"mlxfun/model/anatomy/discover.py"}),
        # Recording what a layer is given while the layers are passed one by one.
        (r"^    def observe\(", {"mlxfun/hooks/layerwise.py"}),
        # What is in force, written as options of `steer`; else they are only declared.
        (
            r"^    .*words \+= .*--level|\"--activate\", steering",
            {"mlxfun/steering/command_line.py"},
        ),
    ],
)
def test_it_is_made_in_one_place(what: str, places: set[str]) -> None:
    text = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sources(*PACKAGES)}
    assert {name for name in text if re.search(what, text[name], re.MULTILINE)} == places
