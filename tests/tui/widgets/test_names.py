"""Widgets share style sheets with Textual's own, which are matched by class name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import textual
from textual.widget import Widget

import tui
from tests.tui.driving import Shell, drive, ready


def classes_in(package: Path) -> Iterator[tuple[str, str]]:
    """(name, module) of every class at the top of a module of a package, read without imports."""
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield node.name, module.removesuffix(".__init__")


def is_widget(name: str, module: str) -> bool:
    found = getattr(import_module(module), name)
    return isinstance(found, type) and issubclass(found, Widget)


def test_no_widget_of_ours_has_the_name_of_one_of_textuals() -> None:
    ours = dict(classes_in(Path(tui.__file__).parent))
    theirs = dict(classes_in(Path(textual.__file__).parent))
    assert is_widget("CommandPalette", theirs["CommandPalette"])
    both = {name for name in ours.keys() & theirs if is_widget(name, ours[name])}
    assert {name for name in both if is_widget(name, theirs[name])} == set()


def test_what_is_typed_after_the_palette_is_seen() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+p")
        await shell.press("escape")
        await shell.press("colon", *"abliterate")
        line = shell.screen.splitlines()[-3]
        assert "abliterate" in line, shell.screen

    drive(test)
