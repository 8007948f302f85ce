"""Recipe files: session files with a target and `try` lines, each a variant to measure.

    #!mlxfun-recipe 1
    #: model demo
    collect --dataset demo:mixed --max-samples 32

    at most 5.4 MB
    judge --dataset demo:eval --max-samples 8
    try prune --n-prune {3,4} --metric {reap_sum,output_error}
    try prune --n-prune 2 then prune --n-prune 1 --allow-stale

    save small

Lines ahead of the first `try` are done first. Every `try` line is a variant, or several: a list in
braces stands for each of its members, all combinations of all lists. `then` applies what is before
it and goes on from there. `at most SIZE` keeps the variant of least loss within that size, `at most
K KL` the smallest within that loss. `judge` takes the options of preview: without it variants are
judged on what collect held out. Lines behind the last `try` are done with the one that was kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from commands.workbench.session_file import Entry, Script, read_script
from mlxfun.errors import UsageError
from mlxfun.session.measuring.variants import Target, parse_target
from mlxfun.text import shown

MOST_VARIANTS = 1000
MOST_CHARACTERS = 10_000_000  # of all variants of a line
_LIST = re.compile(r"\{([^{}]*)\}")
_THEN = re.compile(r"(?<!\s)\s++then\s+")  # linear, however long a run of blanks is


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe.

    before, after: the ordinary commands ahead of and behind the variants; `before` has the file's
    header. variants: for each the command lines that make it. judge: the preview that measures it.
    applies: the best is applied, and not only staged.
    """

    path: Path
    before: Script
    after: Script
    target: Target
    judge: str
    variants: tuple[tuple[str, ...], ...]
    applies: bool = True


def expand(line: str, most: int = MOST_VARIANTS) -> list[str]:
    """Every combination of the members of the lists in braces.

    Raises ValueError for more than `most`, before any is made.

    >>> expand("prune --n-prune {2,4} --metric {reap,freq}")[:2]
    ['prune --n-prune 2 --metric reap', 'prune --n-prune 2 --metric freq']
    """
    pieces = _LIST.split(line)
    if any(brace in text for text in pieces[::2] for brace in "{}"):
        raise ValueError(f"a brace of {shown(line)} is not closed, or inside another")
    lists = [[member.strip() for member in text.split(",")] for text in pieces[1::2]]
    if any(not member for members in lists for member in members):
        raise ValueError(f"a list in {shown(line)} has an empty member: write {{a,b}}")
    count = math.prod(map(len, lists))
    if count > most:
        number = str(count) if count < 10**9 else "over a billion"
        left = "" if most == MOST_VARIANTS else f", of which {most} are left"
        raise ValueError(f"{number} variants are more than {MOST_VARIANTS}{left}")
    if count * len(line) > MOST_CHARACTERS:
        raise ValueError(f"{count} variants of a line of {len(line):,} characters are too long")
    found = []
    for chosen in product(*lists):
        words = [pieces[0]]
        for member, text in zip(chosen, pieces[2::2], strict=True):
            words += [member, text]
        found.append("".join(words))
    return found


def read_recipe(path: Path, check: Callable[[str, bool], None]) -> Recipe:
    """Parse a recipe. check: called with each line and whether it is tried; raises UsageError.

    Raises UsageError with file and line, before anything has run.
    """
    script = read_script(path, kind="recipe")
    reader = _RecipeReader()
    for entry in script.entries:
        try:
            reader.take(entry, check)
        except (UsageError, ValueError) as problem:
            raise UsageError(f"{script.where(entry)}: {problem}") from None
    if reader.target is None:
        raise UsageError(
            f"{path} has no target: add a line such as at most 5.2 MB, or at most 1 KL"
        )
    if not reader.variants:
        raise UsageError(f"{path} tries nothing: add a line such as try prune --n-prune {{2,4}}")
    return Recipe(
        path,
        replace(script, entries=tuple(reader.before)),
        replace(script, header={}, entries=tuple(reader.after)),
        reader.target,
        reader.judge,
        tuple(reader.variants),
    )


class _RecipeReader:
    """Collects the lines of a recipe."""

    def __init__(self) -> None:
        self.before: list[Entry] = []
        self.after: list[Entry] = []
        self.target: Target | None = None
        self.judge = "preview"
        self.variants: list[tuple[str, ...]] = []

    def take(self, entry: Entry, check: Callable[[str, bool], None]) -> None:
        """Add a line. Raises UsageError or ValueError."""
        word, _, rest = entry.line.partition(" ")
        if word == "at":
            if self.target is not None:
                raise ValueError(f"a second target, {shown(entry.line)}: a recipe has one")
            self.target = parse_target(entry.line)
        elif word == "judge":
            self.judge = f"preview {rest}".strip()
            check(self.judge, False)
        elif word == "try":
            if self.after:
                raise ValueError(
                    f"{shown(entry.line)} comes after {shown(self.after[0].line)}: tries first"
                )
            self._add(rest.strip(), check)
        else:
            check(entry.line, False)
            (self.after if self.variants else self.before).append(entry)

    def _add(self, line: str, check: Callable[[str, bool], None]) -> None:
        for variant in expand(line, MOST_VARIANTS - len(self.variants)):
            steps = tuple(_THEN.split(variant))
            for step in steps:
                check(step, True)
            self.variants.append(steps)
