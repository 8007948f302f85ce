"""Options of steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mlxfun.data.options import ExpertSets, ScanKind

SteerRule = Literal["steermoe", "additive"]
"""How activated and deactivated experts are brought about; see mlxfun.steering.rules."""
STEER_RULES: tuple[SteerRule, ...] = get_args(SteerRule)

SteerMode = Literal["safe", "unsafe", "boost", "suppress", "suppress-general"]
"""How a scan's report steers, see ScanMap."""

STEER_MODES: dict[ScanKind, tuple[SteerMode, ...]] = {
    "safety": ("safe", "unsafe"),
    "domain": ("boost", "suppress", "suppress-general"),
}
"""How a scan's report can steer, by its kind; the first is the default."""

ANCESTOR_MODES: dict[tuple[ScanKind, str], SteerMode] = {
    ("safety", "safe"): "unsafe",
    ("safety", "unsafe"): "safe",
    ("domain", "suppress"): "suppress-general",
}
"""(kind, mode) of mlx_fun, where it means something else there: what it is called here."""


@dataclass(frozen=True, slots=True)
class ScanMap:
    """A scan's report and how it steers.

    mode of a safety report: "safe" activates what works more on harmful prompts and deactivates
    what works more on benign ones, "unsafe" the reverse; of a domain report: "boost" activates the
    domain's experts, "suppress" deactivates them, "suppress-general" deactivates those that the
    general text uses more. most: take only so many of its experts, over the
    whole model, strongest first; None for all.
    """

    path: Path
    kind: ScanKind
    mode: SteerMode
    most: int | None = None


@dataclass(frozen=True, slots=True)
class MapInForce:
    """A scan's report that steers. path, kind, mode and most: see ScanMap.

    names: the (decoder layer, expert) pairs that it would steer without a limit and if nothing were
    in the way; cells: those that it steers and nobody has named by hand.
    """

    path: str
    kind: ScanKind
    mode: SteerMode
    most: int | None
    names: tuple[tuple[int, int], ...]
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SteerOptions:
    """Experts to favour or to bar. Empty sets change nothing.

    maps: reports of scans, all at once; a later one goes before an earlier one, and the sets and
    the configuration before all of them, see mlxfun.steering_files. config: a JSON file. rule,
    boost_value and mask_value: None leaves what is in force; the values serve the additive rule.
    levels: {decoder layer: {expert: added to its score}}; 0 takes a level away.
    """

    activate: ExpertSets = field(default_factory=dict)
    deactivate: ExpertSets = field(default_factory=dict)
    clear: bool = False
    maps: tuple[ScanMap, ...] = ()
    config: Path | None = None
    rule: SteerRule | None = None
    boost_value: float | None = None
    mask_value: float | None = None
    allow_stale: bool = False
    levels: dict[int, dict[int, float]] = field(default_factory=dict)
