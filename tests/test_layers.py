"""Arrows run one way, and what is heavy is imported late. In a fresh process each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"textual", "rich", "mlx", "mlx_lm", "numpy", "scipy", "transformers", "huggingface_hub"}


def imported_by(code: str) -> set[str]:
    """The top-level names of all modules that running `code` imports."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return {name.partition(".")[0] for name in done.stdout.split()}


def modules_of(package: str) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_the_engine_imports_no_front_end_and_no_click() -> None:
    code = "\n".join(f"import {name}" for name in modules_of("mlxfun"))
    found = imported_by(code)
    assert "mlx" in found  # the test sees what is imported
    assert not found & {"commands", "tui", "textual", "rich", "click"}


def test_the_commands_import_no_screen() -> None:
    code = "\n".join(f"import {name}" for name in modules_of("commands"))
    found = imported_by(code)
    assert "rich" in found
    assert not found & {"tui", "textual"}


@pytest.mark.parametrize(
    "module", ["commands.cli", "commands.registry", "commands.engine", "mlxfun"]
)
def test_what_runs_before_the_first_paint_imports_nothing_heavy(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from commands.cli import main\n"
        "sys.argv = ['mlxfun-shell', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert not imported_by(code) & HEAVY


def test_parsing_and_completing_lines_imports_nothing_heavy() -> None:
    code = (
        "from commands.engine import Engine\n"
        "engine = Engine()\n"
        "engine.run('prune --n-prune x'); engine.complete('collect --dataset demo:')\n"
        "assert 'Removing experts' in engine.help(None)\n"
        "engine.help('prune'); assert 'ridge' in engine.help('pruning')\n"
        "engine.run('help pruning'); engine.rows(); engine.close()"
    )
    assert not imported_by(code) & HEAVY
