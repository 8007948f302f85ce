"""Every example of README.md and of the guides runs, on the demo model. Minutes, hence slow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, Block, blocks, shell_commands

pytestmark = pytest.mark.slow

FILES = ("#!mlxfun-session", "#!mlxfun-recipe")


def run(tmp_path: Path, words: Sequence[str], cwd: Path = ROOT) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "commands.cli", *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def shown(path: Path, kind: str) -> list[Block]:
    return [block for block in blocks(path) if block.kind == kind]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_commands_of_a_document_run_one_after_the_other(path: Path, tmp_path: Path) -> None:
    lines = [
        line
        for block in shown(path, "mlxfun")
        if not block.text.startswith(FILES)
        for line in block.lines
    ]
    if not lines:
        pytest.skip("it shows none")
    words = [word for line in lines for word in ("-c", line)]
    run(tmp_path, ["--headless", "--demo", "--output-root", str(tmp_path), *words])


FILED = [
    block for path in DOCUMENTS for block in shown(path, "mlxfun") if block.text.startswith(FILES)
]


@pytest.mark.parametrize("block", FILED, ids=lambda block: block.where)
def test_the_session_and_recipe_files_that_are_shown_run(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "example"
    file.write_text(block.text + "\n", "utf-8")
    recipe = block.text.startswith("#!mlxfun-recipe")
    words = ["-c", f"recipe {file}"] if recipe else ["--replay", str(file)]
    run(tmp_path, ["--headless", "--output-root", str(tmp_path), *words])


SCRIPTS = [
    words[1:]
    for path in DOCUMENTS
    for block in shown(path, "sh")
    for words in shell_commands(block)
    if words[:2] == ["mlxfun-shell", "--headless"] and "-c" in words
]


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: words[-1])
def test_the_scripts_that_are_shown_run(words: list[str], tmp_path: Path) -> None:
    run(tmp_path, words, cwd=tmp_path)
