"""The active steering written as one equivalent `steer` command line."""

from __future__ import annotations

from mlxfun.data.expert_notation import spell
from mlxfun.steering.reports import SteerReport


def line_of(steering: SteerReport) -> str:
    """The command that steers as `steering` says and no other way.

    Figures are written in full, so that it steers bit for bit the same.

    >>> line_of(SteerReport({3: (7, 8)}, {}, levels={5: {1: -0.5}}))
    'steer --clear --activate 3:7..8 --level 5:1=-0.5'
    """
    words = ["steer", "--clear"]
    sets = (("--activate", steering.activated), ("--deactivate", steering.deactivated))
    for option, some in sets:
        words += [option, spell(some)] if any(some.values()) else []
    faders = [f"{ly}:{e}={x!r}" for ly, some in steering.levels.items() for e, x in some.items()]
    words += ["--level", ",".join(faders)] if faders else []
    if steering.rule == "additive":
        words += ["--rule", "additive", "--boost-value", repr(steering.boost_value)]
        words += ["--mask-value", repr(steering.mask_value)]
    return " ".join(words)
