"""The README tells the truth: what is generated is up to date, what is code runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands.reference import updated
from commands.registry import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def block_after(marker: str) -> str:
    """The fenced code block that follows `marker`."""
    return README.partition(marker)[2].partition("```python\n")[2].partition("```")[0]


def test_the_generated_parts_are_up_to_date() -> None:
    assert updated(README, ROOT) == README, "run python -m commands.reference --write"


def test_a_stale_table_is_noticed() -> None:
    stale = README.replace("Drop the staged plan", "Keep the staged plan")
    assert stale != README
    assert updated(stale, ROOT) == README


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the markers .* are missing"):
        updated("# mlxfun", ROOT)


def test_every_command_is_in_the_table() -> None:
    table = README.partition("<!-- commands: ")[2].partition("<!-- commands end -->")[0]
    for command in COMMANDS.values():
        assert f"| `{command.name}" in table


def test_the_quick_start_is_two_commands_and_the_second_is_what_ci_runs() -> None:
    assert "\n    pip install -e . && mlxfun-shell --demo\n" in README
    assert "\n    pip install -e '.[test]' && pytest\n" in README
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -e '.[test]'" in script
    assert "LD_PRELOAD=$preload pytest\n" in script


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
