"""Experts as they are typed: 0,1,250..255 and 3:7,5:0..2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxfun.data.options import ExpertSets
from mlxfun.errors import UsageError
from mlxfun.text import shown

_MAX_RANGE = 100_000
_MAX_NAMED = 1_000_000
"""Experts of one text: repeated ranges of a short text could name any number."""


def parse_experts(text: str) -> tuple[int, ...]:
    """Expert numbers of "0,1,250..255" (both ends included), ascending, each once.

    >>> parse_experts("7, 0,2..4")
    (0, 2, 3, 4, 7)

    Raises UsageError naming the piece that is no number or range.
    """
    found: set[int] = set()
    room = _MAX_NAMED
    for piece in text.split(","):
        numbers = _range(piece, text)
        room = _less(room, numbers)
        found.update(numbers)
    return tuple(sorted(found))


def parse_expert_pairs(text: str) -> ExpertSets:
    """Experts by decoder layer of "3:7,3:9,5:0..2".

    >>> parse_expert_pairs("3:9,5:0..2,3:7")
    {3: (7, 9), 5: (0, 1, 2)}

    Raises UsageError naming the piece that is no LAYER:EXPERT pair.
    """
    found: dict[int, set[int]] = {}
    room = _MAX_NAMED
    for piece in text.split(","):
        layer, colon, experts = piece.partition(":")
        if not colon or not _is_number(layer):
            raise UsageError(
                f"{shown(piece.strip())} in {shown(text)} is not LAYER:EXPERT, such as 3:7"
            )
        numbers = _range(experts, text)
        room = _less(room, numbers)
        found.setdefault(int(layer), set()).update(numbers)
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def spell(sets: Mapping[int, Sequence[int]]) -> str:
    """Experts as commands write them, runs shortened.

    >>> spell({3: (7,), 5: (0, 1, 2, 6)})
    '3:7,5:0..2,5:6'
    """
    out = []
    for layer, experts in sets.items():
        start = 0
        for i in range(1, len(experts) + 1):
            if i < len(experts) and experts[i] == experts[i - 1] + 1:
                continue
            first, last = experts[start], experts[i - 1]
            out.append(f"{layer}:{first}" + (f"..{last}" if last > first else ""))
            start = i
    return ",".join(out)


def _range(piece: str, text: str) -> range:
    low, dots, high = (part.strip() for part in piece.partition(".."))
    if not _is_number(low) or (dots and not _is_number(high)):
        raise UsageError(
            f"{shown(piece.strip())} in {shown(text)} is not an expert number or a range such as 250..255"
        )
    first = int(low)
    last = int(high) if dots else first
    if not 0 <= last - first < _MAX_RANGE:
        raise UsageError(
            f"the range {shown(piece.strip())} in {shown(text)} must go up, by a sane amount"
        )
    return range(first, last + 1)


def _less(room: int, numbers: range) -> int:
    """The room that is left for more experts. Raises UsageError if there is none."""
    if len(numbers) > room:
        raise UsageError(f"more than {_MAX_NAMED:,} experts are named: no model has so many")
    return room - len(numbers)


def _is_number(text: str) -> bool:
    digits = text.strip()
    return digits.isascii() and digits.isdigit() and len(digits) < 10
