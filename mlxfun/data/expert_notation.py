"""Experts as they are typed: 0,1,250..255 and 3:7,5:0..2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxfun.data.options import ExpertSets
from mlxfun.errors import UsageError

_MAX_RANGE = 100_000


def parse_experts(text: str) -> tuple[int, ...]:
    """Expert numbers of "0,1,250..255" (both ends included), ascending, each once.

    >>> parse_experts("7, 0,2..4")
    (0, 2, 3, 4, 7)

    Raises UsageError naming the piece that is no number or range.
    """
    found: set[int] = set()
    for piece in text.split(","):
        found.update(_range(piece, text))
    return tuple(sorted(found))


def parse_expert_pairs(text: str) -> ExpertSets:
    """Experts by decoder layer of "3:7,3:9,5:0..2".

    >>> parse_expert_pairs("3:9,5:0..2,3:7")
    {3: (7, 9), 5: (0, 1, 2)}

    Raises UsageError naming the piece that is no LAYER:EXPERT pair.
    """
    found: dict[int, set[int]] = {}
    for piece in text.split(","):
        layer, colon, experts = piece.partition(":")
        if not colon or not _is_number(layer):
            raise UsageError(f"{piece.strip()!r} in {text!r} is not LAYER:EXPERT, such as 3:7")
        found.setdefault(int(layer), set()).update(_range(experts, text))
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
            f"{piece.strip()!r} in {text!r} is not an expert number or a range such as 250..255"
        )
    first = int(low)
    last = int(high) if dots else first
    if not 0 <= last - first < _MAX_RANGE:
        raise UsageError(f"the range {piece.strip()!r} in {text!r} must go up, by a sane amount")
    return range(first, last + 1)


def _is_number(text: str) -> bool:
    digits = text.strip()
    return digits.isascii() and digits.isdigit() and len(digits) < 10
