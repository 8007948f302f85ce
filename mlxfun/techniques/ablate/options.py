"""Options of ablation: source of the direction, edited parts, strengths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mlxfun.data.options import DatasetOptions, require_seed
from mlxfun.errors import UsageError
from mlxfun.model.components import COMPONENTS, Component

Position = Literal["last", "mean"]
"""Where the residual stream is taken: at the prompt's last token, or its mean over all of them."""
POSITIONS: tuple[Position, ...] = get_args(Position)

Target = Literal["all", "safety-experts", "dense-only"]
"""Which weights lose the direction."""
TARGETS: tuple[Target, ...] = get_args(Target)

Projection = Literal["oblique", "orthogonal"]
"""Whether each part loses its own difference, with the least change to other text
(mlxfun.techniques.ablate.oblique), or all parts one direction of the residual stream."""
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

MAX_STRENGTH = 4.0
"""1 removes a direction, 2 turns its sign: beyond 4 a projection only adds noise."""

_TERM = re.compile(r"(?:(?P<component>[a-z]+))?(?:@(?P<layers>[0-9-]+))?(?:=(?P<value>.+))?\Z")


@dataclass(frozen=True, slots=True)
class AblateOptions:
    """What to remove from the residual stream, and what may be changed for it.

    harmful, harmless: prompts; None only with `choose`. layers: which layers' directions come into
    question: "auto", "all" or "a-b". extraction_position: None for last, and both
    when searching. target: see TARGETS. strength: see `parse_strength`; a search overrides it.
    search: trials, 0 for none. max_kl: bound on the first-token KL of a searched edit, in nats;
    max_perplexity: bound on its perplexity of plain text, as a multiple of what it was.
    choose: stage this point of the last search's front instead of looking for a direction.
    answer_tokens: how much of an answer is judged. projection: see PROJECTIONS. directions: how many
    the harmful prompts are told apart by, oblique only. text: plain text to leave as it is; None
    for what the last collect ran.
    """

    harmful: DatasetOptions | None = None
    harmless: DatasetOptions | None = None
    layers: str = "auto"
    extraction_position: Position | None = None
    target: Target = "all"
    safety_map: Path | None = None
    strength: str = "1"
    search: int = 0
    max_kl: float = 0.1
    max_perplexity: float = 1.01
    choose: int | None = None
    answer_tokens: int = 100
    projection: Projection = "oblique"
    directions: int = 1
    text: DatasetOptions | None = None
    seed: int = 0
    allow_stale: bool = False

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, slots=True)
class StrengthTerm:
    """One term of a strength: None stands for every component, every layer."""

    component: Component | None
    layers: tuple[int, int] | None
    value: float


def parse_strength(text: str) -> tuple[StrengthTerm, ...]:
    """A number for everything, or terms `component@a-b=value`; later ones win.

    >>> parse_strength("1.5")
    (StrengthTerm(component=None, layers=None, value=1.5),)
    >>> [(t.component, t.layers, t.value) for t in parse_strength("1,experts=0,attention@2-5=2")]
    [(None, None, 1.0), ('experts', None, 0.0), ('attention', (2, 5), 2.0)]

    Raises UsageError.
    """
    terms = []
    for part in text.split(","):
        part = part.strip()
        if _is_number(part):
            terms.append(StrengthTerm(None, None, _value(part, text)))
            continue
        match = _TERM.match(part)
        if match is None or match["value"] is None:
            raise UsageError(
                f"--strength {text!r}: {part!r} is neither a number nor COMPONENT@A-B=NUMBER, "
                "for instance 1.5 or 1,experts=0,attention@2-5=2"
            )
        component = match["component"]
        if component is not None and component not in COMPONENTS:
            raise UsageError(
                f"--strength {text!r}: no component {component!r}; choose among "
                f"{', '.join(COMPONENTS)}"
            )
        layers = parse_range(match["layers"], "--strength") if match["layers"] else None
        terms.append(StrengthTerm(component, layers, _value(match["value"], text)))
    return tuple(terms)


def parse_range(text: str, option: str) -> tuple[int, int]:
    """`"2-5"` -> (2, 5), `"3"` -> (3, 3). Raises UsageError.

    >>> parse_range("2-5", "--layers")
    (2, 5)
    """
    first, dash, last = text.partition("-")
    if len(text) > 20 or not first.isdigit() or (dash and not last.isdigit()):
        raise UsageError(f"{option}: {text!r} is no range of layers, for instance 2-5")
    low, high = int(first), int(last) if dash else int(first)
    if high < low:
        raise UsageError(f"{option}: the range {text!r} ends before it begins")
    return low, high


def _value(text: str, whole: str) -> float:
    if not _is_number(text) or not 0 <= float(text) <= MAX_STRENGTH:
        raise UsageError(
            f"--strength {whole!r}: {text!r} must be a number from 0 (nothing) over 1 (removed) to "
            f"{MAX_STRENGTH:g}"
        )
    return float(text)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) is not None
