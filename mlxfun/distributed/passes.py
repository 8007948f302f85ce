"""The passes that workers can run: what is wanted of a batch, by the name of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mlxfun.calibration import collect
from mlxfun.hooks.forwards import Watch
from mlxfun.hooks.routing import Taps
from mlxfun.scans import sample_routing
from mlxfun.techniques.ablate import directions
from mlxfun.techniques.prune import super_experts

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

Settings = Mapping[str, Any]
Given = Mapping[str, "Array"]
Pass = Callable[[Any, Taps, "Batch", Settings, Given], Watch["Array"]]
"""(model, its taps, a batch, the task's settings, what goes along with the batch) -> its watch."""


def _routing_sums(model: Any, taps: Taps, batch: Batch, _: Settings, __: Given) -> Watch[Array]:
    return collect.watch(model, taps, batch)


def _sample_routing(
    model: Any, taps: Taps, batch: Batch, _: Settings, given: Given
) -> Watch[Array]:
    return sample_routing.watch(model, taps, batch, given["answers"])


def _expert_peaks(model: Any, taps: Taps, batch: Batch, _: Settings, __: Given) -> Watch[Array]:
    return super_experts.watch(model, taps, batch)


def _residual_means(
    model: Any, _: Taps, batch: Batch, settings: Settings, __: Given
) -> Watch[Array]:
    modules = dict(model.named_modules())
    layers = [modules[path] for path in settings["layers"]]
    return directions.watch(model, layers, batch)


PASSES: Mapping[str, Pass] = {
    collect.PASS: _routing_sums,
    sample_routing.PASS: _sample_routing,
    super_experts.PASS: _expert_peaks,
    directions.PASS: _residual_means,
}
