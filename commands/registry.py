"""The list of all commands, and what derives from it: parsing, help, rows for front ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

import click

from commands import words
from commands.declare import GROUPS, Command, Group, Params
from commands.guides import index as guides
from commands.guides.layout import plain
from commands.table import (
    ablate,
    amplify,
    calibrate,
    chat,
    edit,
    export,
    history,
    measure,
    model,
    narrow,
    recipes,
    scan,
    select,
    shell,
)
from commands.table.inside import data as inside_data
from commands.table.inside import look, sae, vectors
from commands.table.shrink import bits, distil
from mlxfun.errors import UsageError
from mlxfun.session.reports import SessionView
from mlxfun.text import brief, cut, shown

MODULES = (
    *(model, calibrate, scan, edit, narrow, distil, bits, select, ablate, amplify),
    *(look, inside_data, sae, vectors, measure, chat, history, recipes, export, shell),
)

COMMANDS: dict[str, Command] = {c.name: c for module in MODULES for c in module.COMMANDS}
# A family typed without its second word means this member.
FAMILIES = {
    "stats": "stats show",
    "plan": "plan show",
    "profile": "profile save",
    "load": "models",
    "vector": "vector list",
}

SYNONYMS = {
    "load": "open download",
    "info": "model status",
    "info --verify": "verify digest",
    "plan": "fits estimate",
    "residency": "memory slots resident cache",
    "serve": "server clients requests drain pause",
    "layers": "anatomy expert experts",
    "save": "write w store",
    "save --quantize": "quantize quantise",
    "smoke-test": "test check",
    "collect": "calibrate calibration observe watch",
    "stats count": "count",
    "stats diff": "diff",
    "stats purge": "purge",
    "stats subtract": "subtract",
    "stats rank": "rank",
    "why": "explain reason",
    "dossier": "inspect",
    "trace": "peek hook values",
    "difference": "changes",
    "lens": "logit layerwise",
    "attention": "heads pattern patterns induction",
    "patch": "patching causal",
    "attribute": "attribution dla",
    "activations save": "residuals",
    "intervene": "intervention clamp",
    "vector make": "contrast",
    "sae train": "autoencoder dictionary sparse",
    "probe-train": "classifier linear",
    "prune": "pruning remove shrink reap",
    "merge": "ream average",
    "narrow": "width neurons slim",
    "bits": "mixed precision",
    "distil": "distill kd train finetune",
    "compress": "smaller fit budget",
    "abliterate": "ablate",
    "amplify": "boost",
    "steer": "force mute",
    "apply": "commit accept",
    "discard": "reject",
    "flip": "switch toggle swap",
    "tasks": "lm-eval harness mmlu arc",
    "evaluate": "measure score perplexity ppl benchmark bench",
    "chat": "ask talk say generate",
    "tokens": "tokenize tokenise length",
    "undo": "revert rollback back",
    "redo": "forward",
    "goto": "checkout jump",
    "history": "log tree nodes states",
    "name": "label rename tag",
    "set": "options settings config",
    "replay": "run play script source",
    "help": "? man usage commands keys",
    "quit": "exit q x bye close",
}
"""{command: words that people use for it}, for the sentence about an unknown command."""
MEANT = {word: name for name, words in SYNONYMS.items() for word in words.split()}

CLOSE, VERY_CLOSE = 0.6, 0.8
"""How like a command a word must be to be taken for it (difflib's ratio), and how like one that
changes weights or loses something: "calibrate" is 0.74 like "abliterate"."""

MOST_WORDS = 10_000
HELP_WIDTH = 78
LONGEST_NAME = 100  # no name is longer: what is, is compared with none
_OPTION = re.compile(r"--?[A-Za-z][A-Za-z-]*(=.*)?\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """A command as a palette or a key table shows it. reason: why it is not enabled now."""

    name: str
    group: Group
    help: str
    usage: str
    key: str | None
    danger: bool
    undoable: bool
    enabled: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """A valid command line: nothing of it is checked again, but nothing has run yet."""

    command: Command
    params: Params


def rows(view: SessionView) -> tuple[Row, ...]:
    """Every command, with whether it applies to `view`."""
    found = []
    for c in COMMANDS.values():
        reason = c.when(view)
        found.append(
            Row(
                c.name,
                c.group,
                c.short,
                c.usage,
                c.key,
                c.danger,
                c.undoable,
                reason is None,
                reason or "",
            )
        )
    return tuple(found)


def parse(line: str) -> Parsed:
    """The command and parameters of a typed line. Raises UsageError with a remedy."""
    tokens = split(line)
    try:
        return _parse(tokens)
    except UsageError as problem:
        raise UsageError(brief(str(problem), *tokens)) from None


def _parse(tokens: list[str]) -> Parsed:
    if not tokens:
        raise UsageError("an empty line is no command: type help for a list")
    # Some commands mean another one without arguments: plan MODEL and plan, load MODEL and load.
    alone = len(tokens) == 1 and tokens[0] in COMMANDS and tokens[0] in FAMILIES
    found, rest = resolve(FAMILIES[tokens[0]].split() if alone else tokens)
    asking = rest[:1] if found.tail else rest  # in free text "--help" may be meant as it stands
    if any(t in ("--help", "-h") for t in asking):
        return Parsed(COMMANDS["help"], {"name": tuple(found.name.split())})
    if found.tail:
        rest = _guard_text(found, rest)
    elif len(rest) > MOST_WORDS:  # Click takes time quadratic in them
        raise UsageError(f"{found.name}: {len(rest):,} words are too many; usage: {found.usage}")
    try:
        with found.click.make_context(found.name, rest) as context:
            return Parsed(found, context.params)
    except click.UsageError as problem:
        raise UsageError(_sentence(found, problem)) from None


def meant(line: str) -> Command:
    """The command that `line` means; an edit that goes straight to disk leaves the session as it
    is. Raises UsageError if it is no valid line."""
    found = parse(line)
    straight = found.params.get("to") is not None
    return replace(found.command, read_only=True) if straight else found.command


def command_of(line: str) -> str:
    """The name of the command that `line` means. Raises UsageError if it is no valid line."""
    return meant(line).name


def split(line: str) -> list[str]:
    """Words of a line, quotes as in a POSIX shell, except in free text that has a lone one."""
    try:
        return words.split(line)
    except ValueError as problem:
        plain_words = line.split()
        found = COMMANDS.get(plain_words[0])
        if found is not None and found.tail:
            return plain_words
        what = "a quote is not closed" if "quotation" in str(problem) else "a lone \\ at the end"
        raise UsageError(f"{cut(plain_words[0])}: {what} in {shown(line)}") from None


def resolve(tokens: list[str]) -> tuple[Command, list[str]]:
    """The command a line begins with, and the words after it. Raises UsageError."""
    first = tokens[0]
    two = " ".join(tokens[:2])
    if two in COMMANDS:
        return COMMANDS[two], tokens[2:]
    if first in COMMANDS:
        return COMMANDS[first], tokens[1:]
    if first in FAMILIES:
        if len(tokens) == 1 or tokens[1].startswith("-"):
            return COMMANDS[FAMILIES[first]], tokens[1:]
        members = _members(first)
        raise UsageError(
            f"{first}: unknown action {tokens[1]!r}{nearest(tokens[1], members)}; "
            f"choose one of {', '.join(members)}"
        )
    if members := _members(first):  # as of export, which does nothing alone
        known = ", ".join(f"{first} {member}" for member in members)
        raise UsageError(f"{shown(' '.join(tokens[:2]))} is not a command; choose one of {known}")
    raise UsageError(f"unknown command {first!r}{_meant(first)}; type help for a list")


def _members(first: str) -> list[str]:
    """The second words of the commands that begin with `first`."""
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(first + " ")]


def _meant(word: str) -> str:
    """The command that an unknown word means, as `nearest` says it."""
    word = word.lower()
    if word in MEANT:
        return f": did you mean {MEANT[word]}?"
    harmless = {c.name for c in COMMANDS.values() if not (c.group == "edit" or c.danger)}
    return nearest(word, [*COMMANDS, *FAMILIES], VERY_CLOSE) or nearest(
        word, [*harmless, *FAMILIES], CLOSE
    )


def nearest(word: str, known: list[str], cutoff: float = CLOSE) -> str:
    """`": did you mean ...?"`, or nothing when no known word is close."""
    if len(word) > LONGEST_NAME:
        return ""
    close = get_close_matches(word, known, n=1, cutoff=cutoff)
    return f": did you mean {close[0]}?" if close else ""


def _guard_text(found: Command, rest: list[str]) -> list[str]:
    """Put -- before the first word of free text, so that "-5 + 3" is not taken for an option."""
    values = {
        name: option
        for option in found.click.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
    }
    position = 0
    while position < len(rest) and _OPTION.match(rest[position]):
        name, equals, _ = rest[position].partition("=")
        option = values.get(name)
        takes_value = option is not None and not (option.is_flag or option.count)
        position += 2 if takes_value and not equals else 1
    if rest[position : position + 1] == ["--"]:
        return rest
    return [*rest[:position], "--", *rest[position:]]


def _sentence(found: Command, problem: click.UsageError) -> str:
    """A Click error as one sentence of ours."""
    text = problem.format_message().rstrip(".")
    if isinstance(problem, click.NoSuchOption):
        names = [
            name
            for p in found.click.params
            if isinstance(p, click.Option)
            for name in (*p.opts, *p.secondary_opts)
        ]
        hint = nearest(problem.option_name, names)
        return f"{found.name}: no such option {problem.option_name}" + (
            hint or f"; see help {found.name}"
        )
    text = text[0].lower() + text[1:]
    if isinstance(problem, click.MissingParameter) or "unexpected extra" in text:
        text += f"; usage: {found.usage}"
    return f"{found.name}: {text}"


def help_text(
    name: str | None, keys: Mapping[str, str] | None = None, width: int = HELP_WIDTH
) -> str:
    """The overview, the page of a command, or a guide, at most `width` columns wide where it can.

    keys: {command: the user's key for it, "" for none} where that is not the declared one.
    Raises UsageError for an unknown name.
    """
    if not name:
        return _overview()
    if name == "guides":
        return _guides()
    family = [c for c in COMMANDS.values() if c.name.startswith(name + " ")]
    if name not in COMMANDS and family:
        return "\n\n".join(_page(c, keys, width) for c in family)
    if name in guides.GUIDES:
        return plain(guides.source(name), width)
    _suggest_guide(name)
    found, rest = resolve(name.split())
    if rest:
        raise UsageError(f"help: {name!r} is no command; type help for a list")
    return _page(found, keys, width)


def _page(found: Command, keys: Mapping[str, str] | None, width: int) -> str:
    """The help page of one command: usage, options, its key, the guide to read on."""
    context = click.Context(found.click, info_name=found.name, terminal_width=width)
    key = (keys or {}).get(found.name, found.key)
    facts = [f"key {key}"] if key else []
    facts += ["undo takes it back"] if found.undoable else []
    facts += ["cannot be undone"] if found.danger else []
    guide = guides.guide_for(found.name)
    parts = [found.click.get_help(context)]
    parts += [f"{'; '.join(facts).capitalize()}."] if facts else []
    parts += [f"More in the guide: help {guide.name}"] if guide else []
    return "\n\n".join(parts)


def _suggest_guide(name: str) -> None:
    """Raise UsageError if an unknown `name` is more like a guide's name than like a command's."""
    if name.split()[0].lower() in MEANT or len(name) > LONGEST_NAME:
        return
    pages = {*guides.GUIDES, "guides"}
    close = get_close_matches(name, [*COMMANDS, *FAMILIES, *pages], n=1, cutoff=CLOSE)
    if close and close[0] in pages:
        raise UsageError(
            f"help: no command or guide is called {name!r}: did you mean {close[0]}?; type help for "
            "a list"
        )


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    parts = []
    for group in GROUPS:
        members = [c for c in COMMANDS.values() if c.group == group]
        parts.append("\n".join([group, *(f"  {c.name:<{width}}  {c.short}" for c in members)]))
    parts.append(_guides())
    parts.append("help COMMAND explains one; Tab completes commands, options and values.")
    return "\n\n".join(parts)


def _guides() -> str:
    """The guides, a line each."""
    width = max(len(name) for name in guides.GUIDES)
    lines = [f"  {g.name:<{width}}  {g.summary}" for g in guides.GUIDES.values()]
    return "\n".join(["guides (help NAME shows one)", *lines])
