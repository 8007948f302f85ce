"""Options of amplify and bake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxfun.data.options import DatasetOptions


@dataclass(frozen=True, slots=True)
class AmplifyOptions:
    """Which experts are raised in their routers: those of a domain report, by scale x (composite
    score - threshold). scale None: what suits the router, see `usual_scale`. share: in place of a
    scale, by what fraction of itself the share of routed choices that go to these experts shall rise
    on `data`. data: calibration text, also needed where boosts are folded into router rows.
    """

    domain_map: Path
    data: DatasetOptions | None = None
    scale: float | None = None
    threshold: float = 0.0
    share: float | None = None
    allow_stale: bool = False


@dataclass(frozen=True, slots=True)
class BakeOptions:
    """data: calibration text, see AmplifyOptions."""

    data: DatasetOptions | None = None
