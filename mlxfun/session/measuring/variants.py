"""Choice among measured variants of a recipe: target, best variant within it.

A variant is a way of making the model smaller or other. It is judged by the bytes of the model as
it would be saved, and by its loss: the mean KL divergence from the checkpoint, in nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.text import counted, readable_bytes

UNITS = {
    "": 1, "b": 1, "byte": 1, "bytes": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

_TARGET = re.compile(r"at\s+most\s+([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\Z")


@dataclass(frozen=True, slots=True)
class Target:
    """limit: of "bytes" (then the least loss wins) or of "KL" (then the fewest bytes win)."""

    of: Literal["bytes", "KL"]
    limit: float

    def __str__(self) -> str:
        if self.of == "KL":
            return f"at most {self.limit:g} KL"
        return f"at most {int(self.limit)} bytes"

    def met_by(self, variant: Variant) -> bool:
        """Whether a measured variant keeps within the limit."""
        return variant.measured and self._price(variant) <= self.limit

    def _price(self, variant: Variant) -> float:
        assert variant.kl is not None
        return variant.kl if self.of == "KL" else variant.bytes

    def rank(self, variant: Variant) -> tuple[float, float]:
        """Lower is better, among those that meet the target."""
        assert variant.kl is not None
        pair = (float(variant.bytes), variant.kl)
        return pair if self.of == "KL" else (pair[1], pair[0])


def parse_target(text: str) -> Target:
    """ "at most 5.2 MB" or "at most 0.4 KL". Raises UsageError for anything else.

    >>> parse_target("at most 5MiB")
    Target(of='bytes', limit=5242880.0)
    """
    match = _TARGET.match(text.strip())
    unit = match[2].lower() if match else "?"
    if match is None or (unit != "kl" and unit not in UNITS):
        raise UsageError(
            f"{text!r} is no target: write `at most SIZE` such as at most 5.2 MB, or at most 0.4 KL"
        )
    number = float(match[1].replace("_", ""))
    target = Target("KL", number) if unit == "kl" else Target("bytes", number * UNITS[unit])
    if not 0 < target.limit < math.inf:
        raise UsageError(f"{text!r}: the limit must be above 0 and finite")
    return target


@dataclass(frozen=True, slots=True)
class Variant:
    """One tried variant. kl and ratio (perplexity over the checkpoint's) are None when it failed,
    with the reason in `error`. One whose figures are no numbers counts as failed too.
    """

    line: str
    bytes: int
    kl: float | None
    ratio: float | None
    seconds: float
    error: str = ""

    @property
    def measured(self) -> bool:
        """Whether there are figures to judge it by."""
        return all(x is not None and math.isfinite(x) for x in (self.kl, self.ratio))


def best(variants: Sequence[Variant], target: Target) -> int | None:
    """The position of the best variant that meets the target, the first of equals; None if none."""
    meeting = [i for i, variant in enumerate(variants) if target.met_by(variant)]
    return min(meeting, key=lambda i: (target.rank(variants[i]), i), default=None)


def shortfall(variants: Sequence[Variant], target: Target) -> str:
    """A sentence that says how far the nearest variant is from a target that none meets."""
    measured = [v for v in variants if v.measured]
    if not measured:
        reasons = "; ".join(f"{v.line}: {v.error}" for v in variants[:3])
        return f"none of the {len(variants)} variants could be measured ({reasons})"
    if target.of == "KL":
        near = min(measured, key=lambda v: v.kl or 0.0)
        figure = f"{near.kl:.4f} KL"
    else:
        near = min(measured, key=lambda v: v.bytes)
        figure = f"{near.bytes} bytes"
    return (
        f"none of the {len(measured)} measured variants keeps within {target}; the nearest has "
        f"{figure}: {near.line}"
    )


@dataclass(frozen=True, slots=True)
class RecipeReport(Report):
    """A recipe that was run. kept: position of the variant that was applied. files: written."""

    kind: ClassVar[str] = "recipe"
    script: str
    target: str
    bytes_before: int
    variants: tuple[Variant, ...]
    kept: int
    files: tuple[str, ...]

    def summary(self) -> str:
        chosen = self.variants[self.kept]
        kl = chosen.kl if chosen.kl is not None else float("nan")
        return (
            f"{self.script}: {self.target}: kept {chosen.line}, "
            f"{readable_bytes(self.bytes_before)} -> {readable_bytes(chosen.bytes)}, KL {kl:.4f}, "
            f"of {counted(len(self.variants), 'variant', 'variants')}"
        )
