"""The active steering written as one equivalent `steer` command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from mlxfun.data.expert_notation import spell
from mlxfun.steering.options import MapInForce
from mlxfun.steering.reports import SteerReport


def line_of(steering: SteerReport) -> str:
    """The command that steers as `steering` does and no other way, each expert by its number.

    >>> line_of(SteerReport({3: (7, 8)}, {}, levels={5: {1: -0.5}}))
    'steer --clear --activate 3:7..8 --level 5:1=-0.5'
    """
    return line_with_maps(replace(steering, maps=()))


def line_with_maps(steering: SteerReport) -> str:
    """The command that puts `steering` in force: the scan reports in `maps` are named as reports.

    Leave out of the sets what the reports steer. Figures are written in full, so that the command
    steers bit for bit the same.
    """
    words = ["steer", "--clear"]
    sets = (("--activate", steering.activated), ("--deactivate", steering.deactivated))
    for option, some in sets:
        words += [option, spell(some)] if any(some.values()) else []
    levels = [
        f"{ly}:{e}={_figure(x)}" for ly, some in steering.levels.items() for e, x in some.items()
    ]
    words += ["--level", ",".join(levels)] if levels else []
    if steering.rule == "additive":
        words += ["--rule", "additive", "--boost-value", _figure(steering.boost_value)]
        words += ["--mask-value", _figure(steering.mask_value)]
    return " ".join(words + _map_words(steering.maps))


def _map_words(maps: Sequence[MapInForce]) -> list[str]:
    """Options that put scan reports in force; where they disagree the later one decides."""
    words: list[str] = []
    limited = any(use.most is not None for use in maps)
    for use in maps:
        words += [f"--{use.kind}-map", shlex.quote(use.path), f"--{use.kind}-mode", use.mode]
        if limited:
            # Given for one it has to be given for all: a single one would count for all.
            words += ["--max-experts", "all" if use.most is None else str(use.most)]
    return words


def _figure(value: float) -> str:
    """`value` in full, without the zero behind a whole number's point."""
    return repr(float(value)).removesuffix(".0")
