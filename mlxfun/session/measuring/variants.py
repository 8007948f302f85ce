"""Choice among measured variants of a recipe: target, best variant within it, plot of all.

A variant is a way of making the model smaller or other. It is judged by the bytes of the model as
it would be saved, and by its loss: the mean KL divergence from the checkpoint, in nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
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


# -- the picture ------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 20, 44, 56
INK, QUIET, KEPT, LIMIT = "#222222", "#7a8794", "#c2410c", "#2563eb"


@dataclass(frozen=True, slots=True)
class _Axis:
    """Data from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        return [self.low + (self.high - self.low) * i / (count - 1) for i in range(count)]


def loss_svg(variants: Sequence[Variant], target: Target, kept: int | None) -> str:
    """Loss against bytes as an SVG document: a point per measured variant, the limit as a line."""
    measured = [(i, v, v.kl) for i, v in enumerate(variants) if v.kl is not None and v.measured]
    sizes = [v.bytes / 1e6 for _, v, _ in measured]
    losses = [kl for *_, kl in measured]
    if target.of == "bytes":
        sizes.append(target.limit / 1e6)
    else:
        losses.append(target.limit)
    x = _Axis(*_padded(sizes), LEFT, WIDTH - RIGHT)
    y = _Axis(0.0, max([*losses, 1e-6]) * 1.1, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(x, y, target), *_limit(x, y, target)]
    for i, variant, kl in measured:
        colour, radius = (KEPT, 7) if i == kept else (QUIET, 4)
        title = f"{variant.line}: {variant.bytes} bytes, KL {kl:.4f}"
        parts.append(
            f'<circle cx="{x.at(variant.bytes / 1e6):.1f}" cy="{y.at(kl):.1f}" r="{radius}" '
            f'fill="{colour}"><title>{escape(title)}</title></circle>'
        )
    if kept is not None:
        line = variants[kept].line
        shown = line if len(line) <= 84 else line[:81] + "..."
        parts.append(_text(LEFT, 36, f"kept: {shown}", KEPT))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.08 or max(abs(high) * 0.1, 0.1)
    return low - room, high + room


def _frame(x: _Axis, y: _Axis, target: Target) -> list[str]:
    parts = [_text(LEFT, 18, f"loss against size, {target}", INK)]
    parts += [_text(x.at(t), y.start + 18, f"{t:.3g}", INK, "middle") for t in x.ticks()]
    for tick in y.ticks():
        parts.append(_line((x.start, y.at(tick)), (x.end, y.at(tick)), "#e2e6ea"))
        parts.append(_text(x.start - 8, y.at(tick) + 4, f"{tick:.3g}", INK, "end"))
    parts.append(_line((x.start, y.start), (x.end, y.start), INK))
    parts.append(_line((x.start, y.start), (x.start, y.end), INK))
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 14, "size as saved, MB", INK, "middle"))
    parts.append(
        f'<text x="18" y="{(y.start + y.end) / 2:.1f}" fill="{INK}" text-anchor="middle" '
        f'transform="rotate(-90 18 {(y.start + y.end) / 2:.1f})">KL, nats per token</text>'
    )
    return parts


def _limit(x: _Axis, y: _Axis, target: Target) -> list[str]:
    if target.of == "bytes":
        at = x.at(target.limit / 1e6)
        return [_line((at, y.start), (at, y.end), LIMIT, dashed=True)]
    return [_line((x.start, y.at(target.limit)), (x.end, y.at(target.limit)), LIMIT, dashed=True)]


def _line(a: tuple[float, float], b: tuple[float, float], colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" '
        f'stroke="{colour}"{dash}/>'
    )


def _text(x: float, y: float, content: str, colour: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )
