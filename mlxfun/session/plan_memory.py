"""What a model needs, and what of it fits, before it is loaded or even downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.errors import StateError
from mlxfun.memory.plan.bandwidth import disk_bandwidth
from mlxfun.memory.plan.fit import Machine, fit
from mlxfun.memory.plan.headers import outline
from mlxfun.memory.plan.parts import Parts, parts_of
from mlxfun.memory.plan.report import FitReport
from mlxfun.memory.profile import Layers, read_profile
from mlxfun.model.device.memory import memory_limit, on_cpu

if TYPE_CHECKING:
    from mlxfun.arrays import Array


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """source: a directory, "demo" or a Hub id. memory: bytes the model may take, None for what this
    machine gives it. bandwidth: bytes a second of the disk, None to measure it where the model is on
    this machine. profile: a profile of experts, or statistics, by which hits are foretold."""

    source: str | Path
    revision: str | None = None
    memory: int | None = None
    bandwidth: int | None = None
    profile: Path | None = None


def plan_memory(options: MemoryOptions, ctx: Context = SILENT) -> FitReport:
    """What fits how. Reads headers only, and some megabytes to measure the disk.

    Raises ModelError, PlanError for a profile of another model, StateError where it is not known
    how much memory there is.
    """
    found = outline(options.source, options.revision)
    # A given size is that of another machine, most likely with a GPU.
    here = options.memory is None
    memory = memory_limit() if here else options.memory
    if memory is None:
        raise StateError("how much memory there is cannot be told: give --memory SIZE")
    widened = here and on_cpu()
    parts, other = parts_of(found, widened), parts_of(found, not widened).whole
    bandwidth: float | None = options.bandwidth
    if bandwidth is None and found.directory is not None and parts.whole > memory:
        ctx.progress("reading to measure the disk", 0)
        bandwidth = disk_bandwidth(found.directory)
    used = None if options.profile is None else _used(options.profile, parts)
    report = fit(found.model, parts, Machine(memory, bandwidth), used)
    otherwise = None if other == parts.whole else other
    return replace(report, bits=32 if widened else 16, otherwise=otherwise)


def _used(path: Path, parts: Parts) -> Array:
    """How often each expert was chosen, float64 [L, E]."""
    shape = Layers(tuple(parts.expert_bytes), parts.experts)
    if path.suffix.lower() == ".npz":
        return RoutingStats.load(path, shape.indices, shape.experts).score("freq")
    return read_profile(path, shape)
