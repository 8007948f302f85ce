"""Shared by the tests of ablation: plans, randomised norms, and what layers write to the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rigs import Rig

from mlxfun.hooks.replay import intercepting
from mlxfun.model.components import COMPONENTS
from mlxfun.model.delta import Delta
from mlxfun.model.outputs import Output, residual_outputs
from mlxfun.techniques.ablate.delta import ablate_delta, projections
from mlxfun.techniques.ablate.plan import AblationPlan

TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]


def outputs_of(rig: Rig) -> tuple[Output, ...]:
    return residual_outputs(rig.resident.tree.modules, rig.map)


def unit(width: int, seed: int = 7) -> np.ndarray:
    direction = np.random.default_rng(seed).normal(size=width)
    return direction / np.linalg.norm(direction)


def width_of(rig: Rig) -> int:
    first = outputs_of(rig)[0]
    return int(rig.resident.tree.modules[first.path].weight.shape[-2])


def flat(rig: Rig, strength: float, components=COMPONENTS) -> Mapping[str, Mapping[int, float]]:
    """The same strength for some components in all layers."""
    layers = range(len(rig.map.layers))
    return {c: dict.fromkeys(layers, strength) for c in components}


def plan_for(rig: Rig, strength: float = 1.0, **changes: Any) -> AblationPlan:
    given: dict[str, Any] = {
        "direction": tuple(float(v) for v in unit(width_of(rig))),
        "source_layer": 0,
        "position": "last",
        "strengths": flat(rig, strength),
        "norms": {0: 1.0},
        "keep": dict(zip(rig.anatomy.indices, (t.live for t in rig.resident.layers), strict=True)),
    }
    return AblationPlan(**{**given, **changes})


def run_ablation(rig: Rig, plan: AblationPlan | None = None, ctx: Any = None) -> Delta:
    """The delta of a plan (by default all of a random direction); the model unchanged."""
    wanted = projections(outputs_of(rig), plan or plan_for(rig), rig.resident)
    extra = () if ctx is None else (ctx,)
    return ablate_delta(wanted, rig.resident, lambda p: rig.resident.tree.get(p).dtype, *extra)


def randomise_norms(rig: Rig) -> None:
    """Gains other than one, so that a norm behind an output matters."""
    rng = np.random.default_rng(11)
    for module in rig.resident.tree.modules.values():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.array(rng.uniform(0.5, 2.0, module.weight.shape).astype(np.float32))


def shares(rig: Rig, direction: np.ndarray) -> list[float]:
    """Behind each decoder layer the largest |d . h| / |h|, of a stream that begins without d."""
    layers = [rig.resident.tree.modules[layer.path] for layer in rig.map.layers]
    d = mx.array(direction.astype(np.float32))
    found: list[float] = []

    def without(hidden: mx.array) -> mx.array:
        return hidden - (hidden @ d)[..., None] * d

    def watch(number: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number == 0 and args:
            args = (without(args[0]), *args[1:])
        elif number == 0:  # gptj names its arguments
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: without(kwargs[first])}
        out = own(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        share = mx.abs(hidden @ d) / mx.linalg.norm(hidden, axis=-1)
        found.append(float(mx.max(share).item()))
        return out

    with intercepting(layers, watch):
        mx.eval(rig.model(mx.array(TOKENS)))
    return found
