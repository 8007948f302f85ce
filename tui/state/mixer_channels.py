"""The steering mixer's model: channels for single experts, scan reports and vectors. Pure.

A channel is an expert or a scan's report with what it does: forced in or out, or a level that is
added to its score; a report works one of two ways and can be limited to its strongest experts. A
steering vector is added to the residual stream of one layer, times its strength.
Muted channels stay in the mixer. The mixer's command line for experts and reports always names the
whole configuration, so that what a key does never depends on the past; a vector has its own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mlxfun.data.options import ScanKind
from mlxfun.report import Report
from mlxfun.scans.reports import ScanReport
from mlxfun.steering.options import STEER_MODES, MapInForce, SteerMode
from mlxfun.steering.reports import StandingView, SteerReport
from mlxfun.tracing.reports import VectorsReport
from tui.state.steering import full_line

STEP = 0.5
MOST = 12.0
VECTOR_STEP, VECTOR_MOST = 0.25, 8.0
"""Of a vector's strength; 1 is as far as the two sets of samples are apart."""
ExpertWay = Literal["in", "out", "level"]
"""An expert is forced on, forced off, or biased by a level."""
NEXT_WAY: dict[ExpertWay, ExpertWay] = {"in": "out", "out": "level", "level": "in"}


@dataclass(frozen=True, slots=True)
class Channel:
    """One row of the mixer: an expert, with a path a scan report, or with the name or file of a
    vector that vector. on: it is in force.

    way and level: of an expert; level: of a vector its strength at `layer`. kind and mode: of a report, None for an expert. most: take only a
    report's strongest experts. named: how many it could steer.
    """

    on: bool
    way: ExpertWay = "level"
    layer: int = 0
    expert: int = 0
    level: float = 0.0
    path: str = ""
    kind: ScanKind | None = None
    mode: SteerMode | None = None
    name: str = ""
    most: int | None = None
    named: int = 0
    vector: str = ""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Identity: (path, vector, layer, expert)."""
        return self.path, self.vector, self.layer, self.expert


Channels = tuple[Channel, ...]


def of_steering(report: SteerReport | None) -> Channels:
    """A channel for each steered expert, except those that a report steers."""
    if report is None:
        return ()
    theirs = {cell for use in report.maps for cell in use.cells}
    out = [
        Channel(True, way, layer, expert)
        for way, sets in _forced(report)
        for layer, experts in sets.items()
        for expert in experts
        if (layer, expert) not in theirs
    ]
    out += [
        Channel(True, "level", layer, expert, level)
        for layer, levels in report.levels.items()
        for expert, level in levels.items()
    ]
    return (*out, *_vectors(report.interventions))


def _vectors(standing: Iterable[StandingView]) -> Iterator[Channel]:
    for one in standing:
        place = re.fullmatch(r"layers\.(\d+)\.residual", one.name)
        if one.strength is not None and one.source and place is not None:
            layer = int(place[1])
            yield Channel(True, layer=layer, level=one.strength, vector=one.source)


def _forced(report: SteerReport) -> tuple[tuple[ExpertWay, dict[int, tuple[int, ...]]], ...]:
    return ("in", report.activated), ("out", report.deactivated)


def synced(channels: Channels, report: SteerReport | None) -> Channels:
    """The channels brought up to the steering in force.

    Channels of what is steered are on, all others are muted. Experts that a report steers have no
    channels of their own.
    """
    steered = {c.key: c for c in of_steering(report)}
    uses = {use.path: use for use in report.maps} if report is not None else {}
    out = []
    for channel in channels:
        use = uses.pop(channel.path, None)
        if use is not None:
            out.append(_with_use(channel, use))
        elif channel.path:
            out.append(replace(channel, on=False))
        else:
            out.append(steered.pop(channel.key, replace(channel, on=False)))
    out += steered.values()
    out += [_with_use(Channel(True, path=path), use) for path, use in uses.items()]
    return tuple(out)


def _with_use(channel: Channel, use: MapInForce) -> Channel:
    """A report's channel with the mode and limit in force."""
    named = len(use.names)
    limit = use.most if use.most is not None and use.most < named else None
    return replace(channel, on=True, mode=use.mode, most=limit, kind=use.kind, named=named)


def with_report(channels: Channels, report: ScanReport) -> Channels:
    """Add a muted channel for a scan report that names experts, replacing that of the same file."""
    # General experts of a domain scan are never steered.
    tables = (report.more, report.less) if report.technique == "safety" else (report.more,)
    named = sum(len(experts) for sets in tables for experts in sets.values())
    channel = Channel(
        False,
        path=report.path,
        kind=report.technique,
        mode=STEER_MODES[report.technique][0],
        name=report.name,
        named=named,
    )
    others = tuple(c for c in channels if c.path != report.path)
    return (*others, channel) if named else others


def with_vectors(channels: Channels, report: VectorsReport) -> Channels:
    """Add a muted channel for each vector in hand that has none, at the layer that is best."""
    known = {channel.vector for channel in channels}
    new = []
    for row in report.rows:
        apart = max(row.told_apart, key=lambda pair: pair[1], default=None)
        if row.name not in known and apart is not None:
            new.append(Channel(False, layer=apart[0], level=1.0, vector=row.name))
    return (*channels, *new)


def changed_line(
    before: Channels, after: Channels, place: int, steering: SteerReport | None
) -> str:
    """The command line that brings the change of the channel at `place` into force, "" for none."""
    if place < len(before) and before[place].vector:
        old = before[place]
        new = after[place] if len(after) == len(before) else replace(old, on=False)
        return "" if (old.on, old.level) == (new.on, new.level) else _vector_line(new)
    now = line(after, steering)
    return "" if line(before, steering) == now else now


def _vector_line(channel: Channel) -> str:
    if not channel.on:
        return f"intervene layers.{channel.layer}.residual --clear"
    name = shlex.quote(channel.vector)
    return f"vector use {name} --layer {channel.layer} --strength {channel.level:g}"


def line(channels: Channels, steering: SteerReport | None = None) -> str:
    """The command line that puts the channels into force and nothing else.

    steering: the steering in force, whose rule is kept.
    """
    on = [c for c in channels if c.on and not c.vector]
    experts = [c for c in on if not c.path]
    up, down = ({(c.layer, c.expert) for c in experts if c.way == way} for way in ("in", "out"))
    levels = {(c.layer, c.expert): c.level for c in experts if c.way == "level" and c.level}
    maps = [
        MapInForce(c.path, c.kind, c.mode, c.most, (), ())
        for c in on
        if c.kind is not None and c.mode is not None
    ]
    return full_line(steering, up, down, levels, maps)


# What the keys do ---------------------------------------------------------------------------------
def toggled(channels: Channels, place: int) -> Channels:
    """Mute a channel, or bring it back."""
    changed = replace(channels[place], on=not channels[place].on)
    if changed.vector:
        return _at(channels, place, replace(changed, level=changed.level or 1.0))
    if changed.way == "level" and changed.on and not changed.level:
        changed = replace(changed, level=STEP)
    return _at(channels, place, changed)


def faded(channels: Channels, place: int, steps: int) -> Channels:
    """Move a fader by `steps`: an expert's level, a vector's strength, or how many of a report's
    experts are taken. The first step of a muted vector brings it back as it was."""
    channel = channels[place]
    if channel.vector:
        strength = channel.level + steps * VECTOR_STEP if channel.on else channel.level
        strength = max(-VECTOR_MOST, min(VECTOR_MOST, strength))
        return _at(channels, place, replace(channel, level=strength, on=strength != 0))
    if channel.path:
        count = channel.most if channel.most is not None else channel.named
        most = max(1, min(channel.named, count + steps))
        limited = None if most == channel.named else most
        return _at(channels, place, replace(channel, most=limited, on=True))
    # From outside the fader's reach it comes in at the near end.
    start = {"in": MOST + STEP, "out": -MOST - STEP}.get(channel.way, channel.level)
    level = max(-MOST - STEP, min(MOST + STEP, start + steps * STEP))
    if level > MOST:
        return _at(channels, place, replace(channel, way="in", level=0.0, on=True))
    if level < -MOST:
        return _at(channels, place, replace(channel, way="out", level=0.0, on=True))
    return _at(channels, place, replace(channel, way="level", level=level, on=bool(level)))


def turned(channels: Channels, place: int) -> Channels:
    """Switch a channel's way: in, out, level for an expert; the other mode for a report; the other
    direction for a vector."""
    channel = channels[place]
    if channel.vector:
        return _at(channels, place, replace(channel, level=-channel.level, on=True))
    if channel.kind is not None:
        one, other, *_ = STEER_MODES[channel.kind]
        return _at(channels, place, replace(channel, mode=other if channel.mode == one else one))
    way = NEXT_WAY[channel.way]
    level = STEP if way == "level" else 0.0
    return _at(channels, place, replace(channel, way=way, level=level, on=True))


def added(channels: Channels, layer: int, expert: int) -> tuple[Channels, int]:
    """(channels with one for the expert, its place); a new one has a low level."""
    for place, channel in enumerate(channels):
        if channel.key == ("", "", layer, expert):
            return channels, place
    return (*channels, Channel(True, "level", layer, expert, STEP)), len(channels)


def removed(channels: Channels, place: int) -> Channels:
    """Remove a channel."""
    return channels[:place] + channels[place + 1 :]


def _at(channels: Channels, place: int, channel: Channel) -> Channels:
    return (*channels[:place], channel, *channels[place + 1 :])


def after_job(channels: Channels, steering: SteerReport | None, report: Report | None) -> Channels:
    """The channels once a job has ended with `report`: a new scan report or vector gets one."""
    if isinstance(report, ScanReport):
        channels = with_report(channels, report)
    if isinstance(report, VectorsReport):
        channels = with_vectors(channels, report)
    return synced(channels, steering)
