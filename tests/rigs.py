"""Shared by the engine's tests: a resident tiny model with taps and a reader of its base weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import tiny_models
from mlx.utils import tree_flatten

from mlxfun.context import Context
from mlxfun.errors import Cancelled
from mlxfun.hooks.routing import Taps
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.delta import Resident
from mlxfun.model.export import ExportView
from mlxfun.model.model_map import ModelMap, map_model
from mlxfun.techniques.prune.delta import prune_delta, validate
from mlxfun.techniques.prune.plan import PrunePlan


class StopAt(Context):
    """Cancels at the n-th check, once."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if not self.left:
            raise Cancelled("cancelled")


@dataclass
class Rig:
    model: nn.Module
    config: dict[str, Any]
    map: ModelMap
    anatomy: MoEMap
    taps: Taps
    resident: Resident

    def stored(self, path: str) -> mx.Dtype:
        return self.resident.tree.get(path).dtype

    def hold(self, layer: Any) -> Any:
        return layer

    def trial(self, delta: Any) -> Any:
        return self.resident.trial(delta)

    def logits(self, tokens: list[list[int]]) -> mx.array:
        out = self.model(mx.array(tokens))
        mx.eval(out)
        return out

    def prune(self, keep: dict[int, tuple[int, ...]]) -> Any:
        plan = PrunePlan(keep)
        validate(plan, self.resident)
        return self.resident.swap(prune_delta(plan, self.resident))

    def saved_and_reloaded(self) -> nn.Module:
        """A fresh model of the exported config that strictly loads the exported tensors."""
        view = ExportView(self.model, self.resident, self.anatomy, {})
        fresh = tiny_models.empty(view.config(self.config))
        fresh.load_weights([(n, view.tensor(n)) for n in view.names], strict=True)
        mx.eval(fresh.parameters())
        return fresh


def make_rig(model: nn.Module, config: dict[str, Any]) -> Rig:
    found = map_model(model, config)
    base = dict(tree_flatten(model.parameters()))
    resident = Resident(model, found.experts, lambda: base.__getitem__)
    taps = Taps(model, found.experts, resident.layers)
    taps.attach()
    return Rig(model, config, found, found.experts, taps, resident)


def keep_fewer(anatomy: MoEMap, live: int | None = None) -> dict[int, tuple[int, ...]]:
    """Keep 6 of 8 experts, another pair gone in each layer, groups respected."""
    out = {}
    for layer in anatomy.layers:
        drop = {(layer.position + 1) % 4, 4 + (layer.position + 2) % 4}
        out[layer.index] = tuple(e for e in range(layer.num_experts) if e not in drop)
    return out
