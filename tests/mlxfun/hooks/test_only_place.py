"""Classes of modules are swapped in one place, so that they are restored in one place."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ARRAYS = {"mlxfun/hooks/routers.py", "mlxfun/hooks/expert_probe.py"}
"""They give a recorded output a subclass of `mx.array`, which is no module."""


def assignments(path: Path) -> list[str]:
    """What has its `__class__` assigned in a file, or set by name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [
            ast.unparse(t.value)
            for t in targets
            if isinstance(t, ast.Attribute) and t.attr == "__class__"
        ]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            found += [ast.unparse(node)] if "__class__" in ast.unparse(node) else []
    return found


def test_only_intercept_assigns_the_class_of_a_module() -> None:
    files = [p for package in ("mlxfun", "commands", "tui") for p in (ROOT / package).rglob("*.py")]
    found = {str(p.relative_to(ROOT)): assignments(p) for p in files}
    found = {name: what for name, what in found.items() if what}
    assert found.pop("mlxfun/hooks/intercept.py") == ["self.module", "self.module"]
    assert set(found) == ARRAYS
    arrays = {what for some in found.values() for what in some}
    assert arrays == {"y", "result", "watched"}
