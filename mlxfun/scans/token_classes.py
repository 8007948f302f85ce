"""What kinds of tokens an expert serves more than others, beyond chance.

Candidates are classes of tokens (numbers, brackets, Cyrillic letters ...) and the frequent single
tokens. The unit of the test is a block of at most `BLOCK` tokens of one text, not a token: tokens
of one text are not independent, and of a long text at least distant parts nearly are. With h of the
n tokens of a class in block i served by an expert, and r the share of the block's other tokens that
it served,

    d_i = h / n - r                                      (blocks that have tokens of both kinds)

and the mean of d over B blocks is tested against 0 (one-sided t test). No p is taken for less than
2^-B, the least that flipping the signs of B differences can give: few blocks prove nothing, however
alike they are. Benjamini-Hochberg over everything that is looked at bounds the share of false
findings. What passes must also matter: see `LIFT` and `PART`.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.data.datasets import Tokenizer
from mlxfun.scans.contrast import benjamini_hochberg
from mlxfun.scans.reports import Finding

if TYPE_CHECKING:
    from mlxfun.arrays import Array

BLOCK = 64
LEAST_BLOCKS = 5
"""Blocks that must have tokens of a class."""
ALPHA = 0.01
LIFT = 2.0
"""How many times as large an expert's share of the class must be as its share of other tokens."""
PART = 0.2
"""What part of the tokens that an expert serves must be of the class."""
MOST_TOKENS = 100
"""Single tokens that are looked at, the most frequent ones."""

SYMBOLS = {
    "brackets": "()[]{}",
    "quotes": "\"'`“”‘’«»",
    "punctuation": ".,;:!?…–—",
    "operators": "+-*/=<>&|^%~",
}


def class_of(text: str) -> str:
    """The class of a token's text, "" for an ordinary word or part of one.

    >>> [class_of(t) for t in (" 42", "\\n\\n", " (", "),", "HTTP", " Paris", " да", " word")]
    ['numbers', 'line breaks', 'brackets', 'symbols', 'capitals', 'names', 'Cyrillic', '']
    """
    bare = text.strip()
    if not bare:
        return "line breaks" if "\n" in text else "spaces"
    if bare.startswith("<|") or (bare.startswith("<") and bare.endswith(">") and len(bare) > 2):
        return "chat markers"
    if bare.replace(".", "").replace(",", "").isdigit():
        return "numbers"
    letters = [c for c in bare if c.isalpha()]
    if not letters:
        return _symbols(bare)
    script = unicodedata.name(letters[0], "LATIN").split()[0]
    if script != "LATIN":
        return script if script == "CJK" else script.capitalize()
    if bare.isupper() and len(bare) > 1:
        return "capitals"
    return "names" if bare.istitle() and len(bare) > 1 else ""


def _symbols(bare: str) -> str:
    for name, signs in SYMBOLS.items():
        if all(sign in signs for sign in bare):
            return name
    return "symbols" if all(sign in string.punctuation for sign in bare) else ""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is looked at on a text. names: of C candidates; single: bool [C], whether each is one
    token. marks: float64 [T, C], 1 where a token belongs to a candidate. blocks: int [B + 1], where
    blocks begin, and T."""

    names: tuple[str, ...]
    single: Array
    marks: Array
    blocks: Array


def candidates(text: Sequence[Array], tokenizer: Tokenizer) -> Candidates:
    """Classes and frequent tokens of token sequences."""
    tokens = np.concatenate(list(text))
    kinds, place = np.unique(tokens, return_inverse=True)
    texts = [tokenizer.decode([int(kind)]) for kind in kinds]
    classes = [class_of(one) for one in texts]
    names = sorted({name for name in classes if name})
    columns = [np.array([c == name for c in classes])[place] for name in names]
    seen = np.bincount(place, minlength=len(kinds))
    # A token of a class is told by the class; a word is told by itself.
    words = [k for k in np.argsort(-seen, kind="stable") if not classes[k] and texts[k].strip()]
    words = [k for k in words[:MOST_TOKENS] if seen[k] >= LEAST_BLOCKS]
    columns += [place == k for k in words]
    single = np.array([False] * len(names) + [True] * len(words))
    marks = np.stack(columns, axis=1) if columns else np.zeros((len(tokens), 0))
    shown = (*names, *(f"“{texts[k].strip()}”" for k in words))
    return Candidates(shown, single, marks.astype(np.float64), _blocks(text))


def _blocks(text: Sequence[Array]) -> Array:
    starts, at = [0], 0
    for sequence in text:
        count = -(-len(sequence) // BLOCK)
        ends = [at + round(len(sequence) * (k + 1) / count) for k in range(count)]
        starts += ends
        at += len(sequence)
    return np.array(starts)


@dataclass(frozen=True, slots=True)
class Preferences:
    """How much experts prefer candidates, all [C, E]. p: one-sided. share, other: of the tokens of
    the candidate, and of all others, that an expert served; part: of its tokens, how many are the
    candidate's. excess: how many more of these it served than it would at its other rate."""

    p: Array
    share: Array
    other: Array
    part: Array
    excess: Array


def preferences(found: Candidates, served: Array) -> Preferences:
    """Test every candidate for every expert. served: float64 [T, E], 1 where an expert served."""
    marks, blocks = found.marks, found.blocks
    shape = (marks.shape[1], served.shape[1])
    count, total, squares = np.zeros((shape[0], 1)), np.zeros(shape), np.zeros(shape)
    for start, end in pairwise(blocks.tolist()):
        m, s = marks[start:end], served[start:end]
        inside = m.sum(axis=0)[:, None]
        outside = (end - start) - inside
        both = (inside > 0) & (outside > 0)
        hits = m.T @ s
        d = hits / np.maximum(inside, 1) - (s.sum(axis=0) - hits) / np.maximum(outside, 1)
        d = np.where(both, d, 0.0)
        count, total, squares = count + both, total + d, squares + d * d
    of, hits, all_of = marks.sum(axis=0)[:, None], marks.T @ served, served.sum(axis=0)
    share = hits / np.maximum(of, 1)
    other = (all_of - hits) / np.maximum(len(served) - of, 1)
    return Preferences(
        p=_p(count, total, squares),
        share=share,
        other=other,
        part=hits / np.maximum(all_of, 1),
        excess=hits - of * other,
    )


def _p(count: Array, total: Array, squares: Array) -> Array:
    """One-sided p of the means of differences, 1 for too few blocks."""
    n = np.maximum(count, 2)
    mean = total / n
    variance = np.maximum(squares / n - mean**2, 0.0) * n / (n - 1)
    # Differences that are all alike have no variance left; the bound by blocks decides then.
    t = mean / np.sqrt(np.maximum(variance / n, 1e-18))
    # Imported where it is used: SciPy would take a part of every start.
    from scipy.special import stdtr

    p = np.maximum(1.0 - stdtr(n - 1, t), 0.5**n)
    result: Array = np.where(count >= LEAST_BLOCKS, p, 1.0)
    return result


def findings(names: Sequence[str], found: Preferences) -> list[Finding]:
    """For each expert its topic. Preferences of several layers may stand side by side, [C, N]."""
    q = benjamini_hochberg(found.p.reshape(-1)).reshape(found.p.shape) if found.p.size else found.p
    told = (q <= ALPHA) & (found.share >= LIFT * found.other) & (found.part >= PART)
    return [_finding(names, found, q, told, expert) for expert in range(q.shape[1])]


def _finding(
    names: Sequence[str], found: Preferences, q: Array, told: Array, expert: int
) -> Finding:
    ways = np.flatnonzero(told[:, expert])
    if not len(ways):
        return Finding()
    ways = ways[np.argsort(-found.excess[ways, expert], kind="stable")]
    # A second one only if it says nearly as much.
    half = 0.5 * found.excess[ways[0], expert]
    best = [way for way in ways[:2] if found.excess[way, expert] >= half]
    first = best[0]
    evidence = (
        f"routed here: {found.share[first, expert]:.0%} of {names[first]}, "
        f"{found.other[first, expert]:.0%} of other tokens (q {q[first, expert]:.1g})"
    )
    return Finding(", ".join(names[way] for way in best), evidence, float(q[first, expert]))
