"""Steering as sets of (decoder layer, expert) cells, and as one full command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from mlxfun.steering.command_line import line_with_maps
from mlxfun.steering.options import MapInForce
from mlxfun.steering.reports import SteerReport

Cell = tuple[int, int]
"""(decoder layer, expert)"""


def sets_of(cells: Set[Cell]) -> dict[int, tuple[int, ...]]:
    """Cells as {layer: experts}, ascending."""
    out: dict[int, tuple[int, ...]] = {}
    for layer, expert in sorted(cells):
        out[layer] = (*out.get(layer, ()), expert)
    return out


SAID = {"--activate": "on", "--deactivate": "off", "--level": "bias"}


def step_name(command: str) -> str:
    """A step of the history in few words: of steering, which names everything, what it steers.

    >>> step_name("steer --clear --activate 2:3..4 --level 5:1=-0.5"), step_name("prune --n-prune 4")
    ('steer on 2:3..4 bias 5:1=-0.5', 'prune --n-prune 4')
    """
    words = command.split(" ")
    if words[:2] != ["steer", "--clear"] or len(words) < 3:
        return command
    return " ".join(["steer", *(SAID.get(word, word) for word in words[2:])])


def full_line(
    rule: SteerReport | None,
    up: Set[Cell],
    down: Set[Cell],
    levels: Mapping[Cell, float],
    maps: Sequence[MapInForce],
) -> str:
    """The command line that forces `up` on, `down` off, biases by `levels`, and nothing else.

    rule: the steering whose rule and values are kept as long as anything is steered.
    """
    each: dict[int, dict[int, float]] = {}
    for (layer, expert), level in sorted(levels.items()):
        each.setdefault(layer, {})[expert] = level
    whole = SteerReport(sets_of(up), sets_of(down), levels=each, maps=tuple(maps))
    if rule is not None and (up or down or levels or maps):
        values = rule.rule, rule.boost_value, rule.mask_value
        whole = replace(whole, rule=values[0], boost_value=values[1], mask_value=values[2])
    return line_with_maps(whole)
