"""The screen is there before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

from commands.engine import Engine
from tui.app import ShellApp

HEAVY = ("mlx", "mlx_lm", "transformers", "huggingface_hub", "numpy", "scipy")
seen = {}


class Watched(ShellApp):
    def _started(self):
        seen["painted"] = str(self.main.query_one("#empty").visual)
        seen["heavy"] = [name for name in HEAVY if name in sys.modules]
        self.exit(0)


engine = Engine()
Watched(engine, startup_lines=["load demo"]).run(headless=True)
engine.close()
print(seen["heavy"], "|", seen["painted"])
"""


def test_nothing_numeric_is_imported_before_the_first_paint() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("[] | ")


def test_the_screen_never_imports_mlx() -> None:
    code = (
        "import sys, pkgutil, importlib, tui\n"
        "from importlib.util import find_spec\n"
        "for m in pkgutil.walk_packages(tui.__path__, 'tui.'):\n"
        "    if m.name != 'tui.web.server' or find_spec('textual_serve'):\n"
        "        importlib.import_module(m.name)\n"
        "print([m for m in ('mlx', 'mlx_lm', 'click') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr
