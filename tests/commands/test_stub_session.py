"""The stub is called as the real session is, and stands in for all that commands use of it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from mlxfun.session.session import Session
from tests.commands.session_signatures import signatures
from tests.commands.stub_session import StubSession

COMMANDS = Path(__file__).resolve().parents[2] / "commands"


def test_the_signatures_read_from_the_source_are_those_of_the_session() -> None:
    assert len(signatures()) > 40
    for name in ("prune", "chat", "flip", "info", "compare_nodes", "set_counting"):
        real = inspect.signature(getattr(Session, name)).parameters
        read = signatures()[name].parameters
        assert list(read) == list(real)[1:]
        assert [p.default for p in read.values()] == [p.default for p in real.values()][1:]


def test_a_call_that_the_session_would_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        StubSession("demo").undo(1, 2)
    with pytest.raises(TypeError, match="missing a required argument"):
        StubSession("demo").goto()


def test_the_stub_has_every_method_that_a_command_calls() -> None:
    calls = [
        node
        for path in COMMANDS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]
    # Called on the spot, or handed on to be called.
    methods = [(call.func, ("call.session", "session", "bench.session")) for call in calls]
    methods += [(given, ("call.session",)) for call in calls for given in call.args]
    called = {
        method.attr
        for method, owners in methods
        if isinstance(method, ast.Attribute) and ast.unparse(method.value) in owners
    }
    assert {"prune", "chat", "dossier"} <= called
    assert called - {"close"} <= set(signatures())
    assert [name for name in sorted(called) if not hasattr(StubSession, name)] == []
