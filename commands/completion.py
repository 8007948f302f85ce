"""Completion of a partial command line: commands, options, values. Needs no model and no worker."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cache

import click
from click.shell_completion import CompletionItem, ShellComplete

from commands.registry import COMMANDS
from commands.words import split
from mlxfun.session.reports import SessionView


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion: replace `line[start:]` by `text`. hint: a short description of it."""

    text: str
    start: int
    hint: str


def complete(line: str, view: SessionView) -> list[Completion]:
    """The completions of `line` with the cursor at its end. Does not wait for the worker."""
    start, incomplete = last_word(line)
    try:
        words = split(line[:start])
        items = _items(words, incomplete, view)
    except (ValueError, click.ClickException):
        return []  # the text before the cursor is not a command
    if incomplete.startswith("-") and "=" in incomplete:
        start += line[start:].index("=") + 1
    found = [Completion(quoted(str(i.value)), start, i.help or "") for i in items]
    if not words:
        return [_with_reason(c, view) for c in found]
    return found


def last_word(line: str) -> tuple[int, str]:
    """The start of the word under the cursor, and the word without its quotes.

    >>> last_word("load 'my mod")
    (5, 'my mod')
    >>> last_word("prune ")
    (6, '')
    """
    start, quote, word, escaped = 0, "", "", False
    for position, char in enumerate(line):
        if escaped:
            word, escaped = word + char, False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            word, quote = (word, "") if char == quote else (word + char, quote)
        elif char in "'\"":
            quote = char
        elif char.isspace():
            start, word = position + 1, ""
        else:
            word += char
    return start, word


def _items(words: list[str], incomplete: str, view: SessionView) -> list[CompletionItem[str]]:
    completer = ShellComplete(_tree(), {"obj": view}, "mlxfun-shell", "")
    items = completer.get_completions(list(words), incomplete)
    if not items and not incomplete and words:
        # Nothing positional is left: show the options without waiting for a dash.
        items = completer.get_completions(list(words), "--")
    return items


@cache
def _tree() -> click.Group:
    """All commands as a Click group, for completion; two-word names become nested groups."""
    root = click.Group("mlxfun-shell", add_help_option=False)
    for name, command in COMMANDS.items():
        family, _, member = name.rpartition(" ")
        parent = root
        if family:
            existing = root.commands.get(family)
            parent = existing if isinstance(existing, click.Group) else _family(root, family)
        parent.add_command(command.click, member)
    return root


def _family(root: click.Group, name: str) -> click.Group:
    members = [c.name.partition(" ")[2] for c in COMMANDS.values() if c.name.startswith(name + " ")]
    group = click.Group(name, add_help_option=False, short_help=", ".join(members))
    root.add_command(group, name)
    return group


def quoted(value: str) -> str:
    """`value` as one word of a command line; a home directory stays readable.

    >>> quoted("my model"), quoted("~/my model"), quoted("demo:mixed"), quoted("")
    ("'my model'", "~/'my model'", 'demo:mixed', '')
    """
    if value.startswith("~/"):
        return "~/" + (shlex.quote(value[2:]) if value[2:] else "")
    return shlex.quote(value) if value else value


def _with_reason(found: Completion, view: SessionView) -> Completion:
    command = COMMANDS.get(found.text)
    reason = command.when(view) if command is not None else None
    hint = command.short if command is not None else found.hint
    return Completion(found.text, found.start, f"({reason})" if reason else hint)
