"""Every field of every options dataclass is read somewhere in the engine.

A field that is set by a command line and read nowhere is an option without effect. The reads are
found in the syntax trees of mlxfun, with as much of the types as annotations tell: parameters,
fields, and what is assigned from them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROUTES = ("commands", "output_root")
"""Options of serving that the HTTP side reads."""

ENGINE = Path(__file__).resolve().parents[2] / "mlxfun"


@cache
def trees() -> tuple[ast.Module, ...]:
    """The engine's modules; not parsed while tests are collected."""
    return tuple(ast.parse(path.read_text("utf-8")) for path in sorted(ENGINE.rglob("*.py")))


Types = frozenset[str]
NONE: Types = frozenset()


@cache
def options() -> dict[str, list[ast.AnnAssign]]:
    """{class: its fields}, of the classes called ...Options and of those that are fields of them."""
    every = {
        node.name: [f for f in node.body if isinstance(f, ast.AnnAssign)]
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.decorator_list
    }
    found = {name: fields for name, fields in every.items() if name.endswith("Options")}
    for fields in tuple(found.values()):
        inside = {n.id for f in fields for n in ast.walk(f.annotation) if isinstance(n, ast.Name)}
        found |= {name: every[name] for name in inside & set(every)}
    return found


def named(annotation: ast.expr | None) -> Types:
    """The options classes that an annotation names; a container counts as what it holds."""
    if annotation is None:
        return NONE
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    return NONE.union(names & set(options()), *(protocols().get(name, NONE) for name in names))


@cache
def protocols() -> dict[str, Types]:
    """{protocol: the options classes that have all its members}."""
    every = [n for tree in trees() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    bases = {n.name: [b.id for b in n.bases if isinstance(b, ast.Name)] for n in every}
    own = {n.name: {m.name for m in n.body if isinstance(m, ast.FunctionDef)} for n in every}

    def members(name: str) -> set[str]:
        return own.get(name, set()).union(*map(members, bases.get(name, [])))

    fields = {name: {ast.unparse(f.target) for f in some} for name, some in options().items()}
    return {
        name: frozenset(kind for kind, known in fields.items() if members(name) <= known)
        for name in bases
        if "Protocol" in bases[name]
    }


class Reads(ast.NodeVisitor):
    """Collects (class, field) for each read of an attribute, as far as the types are known.

    attributes: {attribute: its classes}; calls: {function: the classes that it returns}.
    """

    def __init__(self, attributes: dict[str, Types], calls: dict[str, Types]) -> None:
        self.attributes, self.calls = attributes, calls
        self.variables: dict[str, Types] = {}
        self.words: set[str] = set()  # the string literals of the function
        self.found: set[tuple[str, str]] = set()

    def types(self, node: ast.expr) -> Types:
        """The options classes that an expression may have."""
        match node:
            case ast.Name():
                return self.variables.get(node.id, NONE)
            case ast.Attribute():
                return self.attributes.get(node.attr, NONE)
            case ast.Call(func=ast.Name(id="replace"), args=[first, *_]):
                return self.types(first)
            case ast.Call(func=ast.Name(id=name)):
                return self.calls.get(name, NONE)
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return NONE.union(*map(self.types, parts))
            case ast.IfExp():
                return self.types(node.body) | self.types(node.orelse)
            case ast.Subscript():
                return self.types(node.value)
            case _:
                return NONE

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, every = (self.variables, self.words), node.args
        arguments = (*every.posonlyargs, *every.args, *every.kwonlyargs)
        self.variables = self.variables | {a.arg: named(a.annotation) for a in arguments}
        self.words = set()
        if any(isinstance(n, ast.Name) and n.id == "getattr" for n in ast.walk(node)):
            self.words = {str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant)}
        self.generic_visit(node)
        self.variables, self.words = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def comprehended(self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp) -> None:
        for part in node.generators:
            self.bind(part.target, part.iter)
        self.generic_visit(node)

    visit_ListComp = visit_GeneratorExp = visit_DictComp = comprehended

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        """What is known of the types of `target` after `target = value`."""
        match target, value:
            case ast.Name(), _:
                self.variables = self.variables | {target.id: self.types(value)}
            case ast.Attribute(attr=name), _:
                self.attributes[name] = self.attributes.get(name, NONE) | self.types(value)
            case ast.Tuple(), ast.Tuple():
                for one, other in zip(target.elts, value.elts, strict=False):
                    self.bind(one, other)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(name, node.attr) for name in self.types(node.value)}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Name()]):
                # The names that a loop runs over are written out in the same function.
                self.found |= {(name, w) for name in self.types(value) for w in self.words}
        self.generic_visit(node)


def reads() -> set[tuple[str, str]]:
    attributes: dict[str, Types] = defaultdict(frozenset)
    calls: dict[str, Types] = defaultdict(
        frozenset, {name: frozenset([name]) for name in options()}
    )
    for node in (n for tree in trees() for n in ast.walk(tree)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            attributes[node.target.id] |= named(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            calls[node.name] |= named(node.returns)
    found = set()
    for _ in range(2):  # the second time with what constructors keep
        for tree in trees():
            visitor = Reads(attributes, calls)
            visitor.visit(tree)
            found |= visitor.found
    return found


def test_every_option_is_read_by_the_engine() -> None:
    fields = {
        (name, ast.unparse(field.target)) for name, some in options().items() for field in some
    }
    assert len(fields) > 100
    routes = "".join(p.read_text("utf-8") for p in (ENGINE.parent / "commands/routes").glob("*.py"))
    of_routes = {
        ("ServeOptions", name) for name in ROUTES if f"options.{name}" in routes
    }  # what a route of the server decides, outside the engine
    assert fields - reads() - of_routes == set(), "set by commands, and without effect"
