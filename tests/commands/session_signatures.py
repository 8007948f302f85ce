"""The signatures of `Session`, for stand-ins that must be called as it is.

They are read from its source: importing it would bring MLX, which the stub is for doing without.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache, wraps
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxfun.context import SILENT

Given = SimpleNamespace
"""The arguments of a call, by the names that Session gives them."""

ROOM = Path(__file__).resolve().parents[2] / "mlxfun" / "session"
SOURCES = {
    "SessionBase": "base.py",
    "Residency": "residency.py",
    "Inspection": "inspection.py",
    "Looking": "looking.py",
    "Studying": "studying.py",
    "Session": "session.py",
}
"""Session and what it derives from, the base first."""


@cache
def signatures() -> dict[str, Signature]:
    """{method of Session: its signature, without self}."""
    found = {}
    for name, file in SOURCES.items():
        tree = ast.parse((ROOM / file).read_text("utf-8"))
        part = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        methods = [node for node in part.body if isinstance(node, ast.FunctionDef)]
        found |= {node.name: _signature(node.args) for node in methods}
    return found


def _signature(arguments: ast.arguments) -> Signature:
    named = [a.arg for a in arguments.args[1:]]
    defaults = [Parameter.empty] * (len(named) - len(arguments.defaults))
    defaults += map(_value, arguments.defaults)
    found = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in zip(named, defaults, strict=True)
    ]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = Parameter.empty if default is None else _value(default)
        found.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=value))
    return Signature(found)


def _value(default: ast.expr) -> Any:
    if isinstance(default, ast.Name):
        return {"SILENT": SILENT}[default.id]
    return ast.literal_eval(default)


def as_in_session(method: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`method(self, given)`, called as Session's method of that name: `given` has its arguments.

    Raises TypeError for a call that Session would not take, AttributeError for another argument.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signatures()[method.__name__].bind(*args, **kwargs)
        bound.apply_defaults()
        return method(self, Given(**bound.arguments))

    return call
